"""llama.cpp's own llama-perplexity, where it has been built; tests that call it are skipped elsewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.llama_tools import llama_tool


def run_tool(model: Path, *arguments) -> str:
    """What the tool prints when it runs `model` on one thread."""
    command = [llama_tool("llama-perplexity"), "-m", model, "-t", 1, *arguments]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def write_base(model: Path, text: Path, out: Path, n_ctx: int, *options) -> float:
    """The tool's own file of log-probabilities; returns the perplexity it prints."""
    said = run_tool(model, "-f", text, "-c", n_ctx, "--kl-divergence-base", out, *options)
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", said)[1])


def compare_with(model: Path, base: Path) -> dict[str, float]:
    """The tool's verdict on `model` against a file of log-probabilities: kl_mean, ppl, ppl_reference, top1, ..."""
    said = run_tool(model, "--kl-divergence", "--kl-divergence-base", base)
    names = {"kl_mean": "Mean    KLD", "kl_max": "Maximum KLD", "kl_median": "Median  KLD", "kl_p90": "90.0%   KLD",
             "ppl": r"Mean PPL\(Q\)", "ppl_reference": r"Mean PPL\(base\)", "top1": "Same top p"}
    return {key: float(re.search(rf"{name} *: *([-\d.]+)", said)[1]) / (100 if key == "top1" else 1)
            for key, name in names.items()}
