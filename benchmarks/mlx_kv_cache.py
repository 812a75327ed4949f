"""What R3 saves of a quantised KV cache in MLX.

    python benchmarks/mlx_kv_cache.py --text wiki.test.raw

*Model, text, score.* The dithered SmolLM2-135M and evaluation windows of `rotations.py`. Weights stay float32, so that
the cache alone errs: KL(float ‖ package) in nats, in mlx-lm, with keys and values in 8 or 4 bits (groups of 64) from
the first token on, as `optrot-edge eval --kv-bits` has it. `plain` is the model as it is; `r3` has a Walsh-Hadamard
transform of each head's queries and keys after RoPE, in the package's model file.

The ratio of r3 to plain carries a paired bootstrap 95 % interval over windows.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rotations import arguments, save
from scoring import Reference, bootstrap_ratio, standard_error
from testbed import build_testbed, sha256
from texts import evaluation_windows, load_text

from optrot_edge import pipeline
from optrot_edge.rotating import versions
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.mlx import MlxBackend

ARMS = {"plain": {"rotation": "none"}, "r3": {"rotation": "hadamard", "rotate": "r3"}}


def run(options) -> dict:
    """Measure both arms with every cache."""
    torch.set_num_threads(options.threads)
    model, text = build_testbed(options.work / "testbed"), load_text(options.text)
    with LlamaCppBackend(model, vocab_only=True) as backend:
        windows = evaluation_windows(backend, text.evaluation, options.windows, options.seqlen)
    reference, rows = Reference(model, windows, options.work), []
    for arm, fields in ARMS.items():
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            package = Path(folder) / "package"
            pipeline.export(model, package, format="mlx", type="f32", embedding_type="f32", head_type="f32",
                            dtype="float32", quantizer="rtn", calibration="none", **fields)
            for bits in (None, 8, 4):
                with MlxBackend(package, trust_remote_code=True, kv_bits=bits) as backend:
                    score = reference.score(map(torch.from_numpy, backend.iter_logits(windows)))
                rows.append({"arm": arm, "kv_bits": bits, **score,
                             "kl_standard_error": standard_error(score["kl_windows"])})
                print(arm, bits, f"{score['kl']:.3g}", flush=True)
    plain, r3 = ({row["kv_bits"]: row["kl_windows"] for row in rows if row["arm"] == arm} for arm in ARMS)
    return {"settings": {"testbed": model.name, "testbed_sha256": sha256(model), "text": text.source,
                         "text_sha256": text.sha256, "windows": options.windows, "seqlen": options.seqlen},
            "versions": versions() | {name: metadata.version(name) for name in ("mlx", "mlx-lm")}, "rows": rows,
            "r3 to plain": {bits: bootstrap_ratio(np.array([r3[bits]]), np.array(plain[bits])) for bits in (8, 4)}}


def print_table(results: dict) -> None:
    """KL by arm and bits."""
    table = Table("keys and values", "arm", "KL", "to plain (95 %)")
    for row in results["rows"]:
        ratio = results["r3 to plain"].get(row["kv_bits"]) if row["arm"] == "r3" else None
        table.add_row(f"{row['kv_bits']} bits" if row["kv_bits"] else "float32", row["arm"],
                      f"{row['kl']:.3g} ± {row['kl_standard_error']:.1g}",
                      f"{ratio['ratio']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio else "")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    parsed = arguments(__doc__.splitlines()[0], "mlx_kv_cache").parse_args()
    found = run(parsed)
    save(parsed.out, found)
    print_table(found)
