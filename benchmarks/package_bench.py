"""The frame of benchmarks of whole packages: model, texts, calibration file, reference, and arms written as done."""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from rotations import save
from scoring import Reference
from testbed import build_testbed, sha256
from texts import calibration_text, evaluation_windows, load_text

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.rotating import versions
from optrot_edge.runtime.llama_cpp import LlamaCppBackend


class PackageBench:
    """Models, texts and scores of one run. `more` are its settings besides those of every script."""

    def __init__(self, options: argparse.Namespace, **more):
        torch.set_num_threads(options.threads)
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.model, text = build_testbed(self.work / "testbed"), load_text(options.text)
        with LlamaCppBackend(self.model, vocab_only=True) as backend:
            windows = evaluation_windows(backend, text.evaluation, options.windows, options.seqlen)
            self.words = calibration_text(backend, text.calibration, options.nsamples, options.seqlen)
            self.ids = backend.tokenize(self.words)
        self.folder = tempfile.TemporaryDirectory(prefix="packages-", dir=self.work)
        self.calibration = Path(self.folder.name) / "calibration.txt"
        self.calibration.write_text(self.words, encoding="utf-8")
        self.reference = Reference(self.model, windows, self.work)
        self.settings = {"testbed": self.model.name, "testbed_sha256": sha256(self.model), "text": text.source,
                         "text_sha256": text.sha256, "windows": options.windows, "seqlen": options.seqlen,
                         "nsamples": options.nsamples, **more}

    def float_folder(self) -> Path:
        """The model as the folder that peers start from, made once."""
        out = Path(self.folder.name) / "float"
        return out if out.exists() else float_folder(self.model, out)


def float_folder(model: Path, out: Path) -> Path:
    """The model as a Hugging Face folder in float32."""
    pipeline.export(model, out, format="mlx", type="f32", embedding_type="f32", head_type="f32", dtype="float32",
                    rotation="none", quantizer="rtn", calibration="none")
    return out


def measure_missing(bench: PackageBench, keys: tuple[str, ...], cases, libraries: tuple[str, ...], ratios) -> dict:
    """Measure those of `cases` (tuples of the rows' `keys`) that `--out` lacks, and `ratios(rows)`, writing each at
    once; InputError if it holds other settings'."""
    out = bench.options.out
    results = json.loads(out.read_text()) if out.exists() else {
        "settings": bench.settings, "versions": versions() | {name: metadata.version(name) for name in libraries},
        "rows": []}
    if results["settings"] != bench.settings:
        raise InputError(f"{out} was measured with other settings; choose another --out or remove it")
    done = {tuple(row[key] for key in keys) for row in results["rows"]}
    for case in cases:
        if case not in done:
            results["rows"].append(bench.measure(*case))
            results["ratios"] = ratios(results["rows"])
            save(out, results)
            row = results["rows"][-1]
            print(*case, json.dumps({"bytes": row["bytes"], "kl": row["kl"]}), flush=True)
    return results
