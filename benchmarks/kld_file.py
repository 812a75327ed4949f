"""What llama-perplexity's 16-bit files of log-probabilities cost in precision, and whether the tool agrees.

    python benchmarks/kld_file.py --text wiki.test.raw

*Model and packages.* The dithered SmolLM2-135M (`testbed.py`) in float32 torch is the reference; packages are
llama-quantize's `--pure` files of it, from nearly lossless to coarse, in llama.cpp.

*Numbers.* KL(reference ‖ package) in nats on the scored positions of `--windows` chunks of `--seqlen` tokens, three
times: `exact` from the float32 logits of both, `file` from the same package logits and the .kld file (what `optrot-edge
eval` reports), and `llama-perplexity` as the tool itself prints it for that file. Besides: the largest and the root
mean square error of `file` at a single position, and `itself`, the KL that the file finds for the very logits it was
made from, whose exact value is 0.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from arms import run_logged
from llama_tools import get_tools
from rich.console import Console
from rich.table import Table
from rotations import arguments, save
from testbed import build_testbed, sha256
from texts import load_text

from optrot_edge.rotating import versions
from optrot_edge.runtime.kld_file import cut_chunks, text_tokens, write_kld
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.metrics import Scores
from optrot_edge.runtime.torch_reference import TorchBackend

TYPES = ("q8_0", "q6_K", "q5_0", "q4_0")


class Kept(TorchBackend):
    """Keeps the second halves of the logits it gives, [positions + 1, vocab] each."""

    def iter_logits(self, tokens, *, progress=None):
        """Logits [n, vocab] of each window."""
        self.kept = []
        for logits in super().iter_logits(tokens, progress=progress):
            self.kept.append(logits[logits.shape[0] // 2:])
            yield logits


def compare(stored, kept: list[np.ndarray], logits) -> tuple[dict, np.ndarray]:
    """Mean KL exactly and by the file, and its errors [chunks, positions]."""
    scores, found = Scores(), []
    for chunk, (expected, got) in enumerate(zip(kept, logits, strict=True)):
        scores.add(expected, got, stored.tokens[chunk, stored.first:])
        found.append(stored.compare(chunk, got).estimate)
    exact, found = np.array(scores.kl), np.array(found)
    return {"exact": float(exact.mean()), "file": float(found.mean())}, found - exact


def by_tool(program: Path, package: Path, base: Path, threads: int) -> float:
    """llama-perplexity's mean KL."""
    command = [program, "-m", package, "-t", str(threads), "--kl-divergence", "--kl-divergence-base", base]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"Mean +KLD: +(-?[\d.]+)", said)[1])


def run(options) -> dict:
    """Write the file, make the packages, compare."""
    torch.set_num_threads(options.threads)
    model, text, tools = build_testbed(options.work / "testbed"), load_text(options.text), get_tools()
    with LlamaCppBackend(model, vocab_only=True) as backend:
        tokens = cut_chunks(text_tokens(backend, text.evaluation), options.seqlen, options.windows, options.windows)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kld-", dir=options.work) as folder:
        base, original = Path(folder) / "base.kld", Kept(model)
        stored = write_kld(base, original, tokens, bos=None)  # SmolLM2 adds none
        for kind in TYPES:
            package = Path(folder) / "package.gguf"
            run_logged([tools.quantize, "--pure", model, package, kind.upper(), "1"], options.work / "quantize.log")
            with LlamaCppBackend(package, n_threads=options.threads) as backend:
                halves = (logits[stored.first:] for logits in backend.iter_logits(stored.tokens))
                row, errors = compare(stored, original.kept, halves)
            rows.append({"type": kind, **row, "llama-perplexity": by_tool(tools.perplexity, package, base,
                                                                          options.threads),
                         "largest_error": float(np.abs(errors).max()), "rms_error": float(np.sqrt((errors**2).mean()))})
            print(rows[-1], flush=True)
        itself = compare(stored, original.kept, original.kept)[0]["file"]
        size = base.stat().st_size
    return {"settings": {"testbed": model.name, "testbed_sha256": sha256(model), "text": text.source,
                         "text_sha256": text.sha256, "windows": options.windows, "seqlen": options.seqlen},
            "versions": versions() | {"llama-cpp-python": metadata.version("llama-cpp-python")},
            "bytes": size, "positions": int(stored.nll.size), "itself": itself, "rows": rows}


def print_table(results: dict) -> None:
    """Mean KL three times, and errors by position."""
    table = Table("package", "exact", "file", "llama-perplexity", "error: rms", "largest")
    for row in results["rows"]:
        table.add_row(row["type"], *(f"{row[name]:.6f}" for name in ("exact", "file", "llama-perplexity")),
                      f"{row['rms_error']:.1e}", f"{row['largest_error']:.1e}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"itself: {results['itself']:.1e}; {results['bytes']:,} bytes for {results['positions']:,} positions")


if __name__ == "__main__":
    parsed = arguments(__doc__.splitlines()[0], "kld_file").parse_args()
    found = run(parsed)
    save(parsed.out, found)
    print_table(found)
