"""llama.cpp's own llama-perplexity, where it has been built; tests that call it are skipped elsewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.llama_tools import llama_tool


def run_tool(model: Path, patterns: dict[str, str], *arguments) -> dict[str, float]:
    """The numbers that the tool prints behind `patterns` when it runs `model` on one thread. Its logging thread loses
    lines when the program ends quickly, as it does with tiny models; then it runs again."""
    command = [llama_tool("llama-perplexity"), "-m", model, "-t", 1, *arguments]
    for _ in range(30):
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
        said = run.stdout + run.stderr
        found = {name: re.search(rf"{pattern} *([-\d.]+)\D", said) for name, pattern in patterns.items()}
        if all(found.values()):
            return {name: float(match[1]) for name, match in found.items()}
    raise AssertionError(f"not all of {list(patterns)} in {said}")


def write_base(model: Path, text: Path, out: Path, n_ctx: int, *options) -> float:
    """The tool's own file of log-probabilities; returns the perplexity it prints."""
    return run_tool(model, {"ppl": "Final estimate: PPL ="}, "-f", text, "-c", n_ctx, "--kl-divergence-base", out,
                    *options)["ppl"]


def compare_with(model: Path, base: Path) -> dict[str, float]:
    """The tool's verdict on `model` against a file of log-probabilities: kl_mean, ppl, ppl_reference, top1, ..."""
    names = {"kl_mean": "Mean    KLD", "kl_max": "Maximum KLD", "kl_median": "Median  KLD", "kl_p90": "90.0%   KLD",
             "ppl": r"Mean PPL\(Q\)", "ppl_reference": r"Mean PPL\(base\)", "top1": "Same top p"}
    found = run_tool(model, {key: f"{name} *:" for key, name in names.items()}, "--kl-divergence",
                     "--kl-divergence-base", base)
    return found | {"top1": found["top1"] / 100}
