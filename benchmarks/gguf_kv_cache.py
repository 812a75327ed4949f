"""What llama.cpp's quantised KV caches cost, and what its own rotation of them saves.

    python benchmarks/gguf_kv_cache.py --text wiki.test.raw

*Model, text, score.* The dithered SmolLM2-135M and evaluation windows of `rotations.py`. The weights are the float
model's, so that the cache alone errs: KL(float ‖ package) in nats, in llama.cpp, with keys and values of each type from
the first token on, as `optrot-edge eval --kv-type` has it. `rotated` is llama.cpp as it is, which applies a block
Hadamard transform to quantised keys and values of this model (heads of 64); `plain` turns that off.

The ratio of rotated to plain carries a paired bootstrap 95 % interval over windows.
"""

from __future__ import annotations

import sys
from importlib import metadata
from statistics import mean

import gguf
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rotations import arguments, save
from scoring import Reference, bootstrap_ratio, standard_error
from testbed import build_testbed, sha256
from texts import evaluation_windows, load_text

from optrot_edge.rotating import versions
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

TYPES = ("q8_0", "q8_0,q4_0", "q4_0")


def bits_of(kv_type: str) -> float:
    """Bits stored per cached number, keys and values together."""
    kinds = [gguf.GGMLQuantizationType[name.upper()] for name in kv_type.split(",")]
    return mean(8 * size / block for block, size in map(gguf.GGML_QUANT_SIZES.get, kinds))


def run(options) -> dict:
    """Measure every cache, the quantised ones with the rotation and without."""
    torch.set_num_threads(options.threads)
    model, text = build_testbed(options.work / "testbed"), load_text(options.text)
    with LlamaCppBackend(model, vocab_only=True) as backend:
        windows = evaluation_windows(backend, text.evaluation, options.windows, options.seqlen)
    reference, rows = Reference(model, windows, options.work), []
    for kv_type in ("f16", *TYPES):
        for rotation in (True, False) if kv_type in TYPES else (True,):
            with LlamaCppBackend(model, kv_type=kv_type, kv_rotation=rotation, n_threads=options.threads) as backend:
                score = reference.score(map(torch.from_numpy, backend.iter_logits(windows)))
                rotated = backend.kv_cache.rotated
            rows.append({"kv_type": kv_type, "bits": bits_of(kv_type), "rotated": rotated, **score,
                         "kl_standard_error": standard_error(score["kl_windows"])})
            print(kv_type, rotated, f"{score['kl']:.3g}", flush=True)
    found = {(row["kv_type"], bool(row["rotated"])): row["kl_windows"] for row in rows}
    return {"settings": {"testbed": model.name, "testbed_sha256": sha256(model), "text": text.source,
                         "text_sha256": text.sha256, "windows": options.windows, "seqlen": options.seqlen},
            "versions": versions() | {"llama-cpp-python": metadata.version("llama-cpp-python")}, "rows": rows,
            "rotated to plain": {kv_type: bootstrap_ratio(np.array([found[kv_type, True]]),
                                                          np.array(found[kv_type, False])) for kv_type in TYPES}}


def print_table(results: dict) -> None:
    """KL by type, rotated or not."""
    table = Table("keys, values", "bits", "", "KL", "to plain (95 %)")
    for row in results["rows"]:
        ratio = results["rotated to plain"].get(row["kv_type"]) if row["rotated"] else None
        table.add_row(row["kv_type"], f"{row['bits']:g}",
                      "rotated" if row["rotated"] else "plain", f"{row['kl']:.3g} ± {row['kl_standard_error']:.1g}",
                      f"{ratio['ratio']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio else "")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    parsed = arguments(__doc__.splitlines()[0], "gguf_kv_cache").parse_args()
    found = run(parsed)
    save(parsed.out, found)
    print_table(found)
