"""KL of MLX packages at equal bits and group size: this project's against mlx-lm's own.

    python benchmarks/mlx_vs_mlx_lm.py --text wiki.test.raw

*Model, text, score.* As in `rotations.py`: the dithered SmolLM2-135M, 96 × 256 calibration tokens for all sides,
32 × 256 evaluation tokens; KL(float ‖ package) in nats. The weights are those that `mx.dequantize` gives for the
package on disk, in torch and float32; `mlx` is the package in mlx-lm itself, its scales cast to float32 (a CPU is slow
in float16), on the first `--mlx-windows` windows.

*Arms.* All matrices, the tied one too, have the same bits and groups, scales and biases float16. `convert`:
`mlx_lm.convert -q`, which rounds to nearest. `gptq`: `mlx_lm.gptq`'s quantiser on the model in float32, where its own
command would use the model's dtype; `awq`: `mlx_lm.awq`'s, on `--awq-samples` windows. `ours+none`, `ours+plus-r2`
(OptRot+ of R2 and channel scales): the embedding stays tied. `ours+hadamard`, `ours+optrot` untie it and take more
bytes; `ours+auto` is this project's default.

Ratios carry a paired bootstrap 95 % interval over windows. Arms are written to `--out` as they are done; a second run
continues and refuses other settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from package_bench import PackageBench, measure_missing
from rich.console import Console
from rich.table import Table
from rotations import ARMS as ROTATIONS
from rotations import arguments
from scoring import bootstrap_ratio, standard_error, torch_logits

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.quantize.calibration import sample_windows

PEERS = ("convert", "gptq")
OURS = {f"ours+{name}": fields for name, fields in (*ROTATIONS.items(), ("auto", {"rotation": "auto"}))}
ARMS = [*PEERS, "ours+none", "ours+plus-r2", "ours+hadamard", "ours+optrot", "ours+auto"]


class Bench(PackageBench):
    """Packages and scores of one run."""

    def make(self, arm: str, out: Path) -> None:
        """The arm's package at `out`."""
        options = self.options
        if arm in OURS:
            pipeline.export(self.model, out, format="mlx", bits=options.bits, group_size=options.group_size,
                            dtype="float16", calibration=str(self.calibration), nsamples=options.nsamples,
                            seqlen=options.seqlen, **OURS[arm])
        elif arm == "convert":
            from mlx_lm import convert

            convert(str(self.float_folder()), str(out), quantize=True, q_bits=options.bits,
                    q_group_size=options.group_size, dtype="float16")
        else:
            self._learned(arm, out)

    def _learned(self, arm: str, out: Path) -> None:
        """mlx-lm's quantisers that calibrate, on the same tokens."""
        from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config
        from mlx_lm.quant.gptq import gptq_quantize
        from mlx_lm.utils import load
        from mlx_lm.utils import save as save_package

        bits, group, tokens = self.options.bits, self.options.group_size, mx.array(self.tokens().astype(np.int32))
        model, tokenizer, config = load(str(self.float_folder()), return_config=True)
        if arm == "gptq":
            model, config["quantization"] = gptq_quantize(model, tokens, bits, group, bits, group)
        elif arm == "awq":
            awq_quantize(model, tokens[:self.options.awq_samples], AWQ_MODEL_CONFIGS[config["model_type"]], bits=bits,
                         group_size=group, embed_bits=bits, embed_group_size=group)
            config = update_config(model, config)
        else:
            raise InputError(f"unknown arm {arm}; use {', '.join([*PEERS, 'awq', *OURS])}")
        model.set_dtype(mx.float16)
        save_package(out, self.float_folder(), model, tokenizer, config)

    def tokens(self) -> np.ndarray:
        """The windows that all sides calibrate on."""
        return sample_windows(self.ids, self.options.nsamples, self.options.seqlen, 0, None)

    def measure(self, arm: str) -> dict:
        """One row of the results."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="mlx-", dir=self.work) as folder:
            package = Path(folder) / "package"
            self.make(arm, package)
            made = time.perf_counter()
            score = self.reference.score(torch_logits(decoded(package, Path(folder) / "decoded"),
                                                      self.reference.windows))
            shutil.rmtree(Path(folder) / "decoded")
            return {"arm": arm, "bytes": sum(path.stat().st_size for path in package.glob("*.safetensors")), **score,
                    "kl_standard_error": standard_error(score["kl_windows"]), "mlx": self.in_mlx(package),
                    "seconds": round(made - started, 1)}

    def in_mlx(self, package: Path) -> dict:
        """The package's score in mlx-lm, on the first windows."""
        from mlx_lm.utils import load_model

        model, _ = load_model(package)
        model.set_dtype(mx.float32)
        windows = self.reference.windows[:self.options.mlx_windows]
        return self.reference.score(torch.from_numpy(np.array(model(mx.array(window[None]))[0])) for window in windows)


def decoded(package: Path, out: Path) -> Path:
    """The Hugging Face folder, float32, of what `mx.dequantize` makes of a package's arrays."""
    config = json.loads((package / "config.json").read_text())
    quantization = config.pop("quantization", {})
    for key in ("quantization_config", "optrot"):
        config.pop(key, None)
    arrays = {name: array for path in package.glob("*.safetensors") for name, array in mx.load(str(path)).items()}
    weights = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" in arrays and name.endswith(".weight"):
            grid = quantization | quantization.get(module, {})
            array = mx.dequantize(array, arrays[f"{module}.scales"], arrays[f"{module}.biases"], grid["group_size"],
                                  grid["bits"])
        if not name.endswith((".scales", ".biases")):
            weights[name] = array.astype(mx.float32)
    out.mkdir()
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def ratios(rows: list[dict]) -> dict:
    """By arm: bytes, KL, and its ratios to the peers and to ours without a rotation."""
    found = {}
    for row in rows:
        found[row["arm"]] = {"bytes": row["bytes"], "kl": row["kl"], "kl_mlx": row["mlx"]["kl"], "top1": row["top1"]}
        for peer in rows:
            if (peer["arm"] not in OURS or peer["arm"] == "ours+none") and peer is not row:
                found[row["arm"]][f"to {peer['arm']}"] = bootstrap_ratio(np.array([row["kl_windows"]]),
                                                                         np.array(peer["kl_windows"]))
    return found


def run(options: argparse.Namespace) -> dict:
    """Measure what is missing; InputError if `--out` holds other settings."""
    bench = Bench(options, bits=options.bits, group_size=options.group_size, mlx_windows=options.mlx_windows)
    return measure_missing(bench, ("arm",), ((arm,) for arm in options.arms), ("mlx", "mlx-lm"), ratios)


def print_table(results: dict) -> None:
    """Sizes, KL and ratios, best last."""
    form = lambda r: f"{r['ratio']:.3f} ({r['low']:.3f}-{r['high']:.3f})" if r else ""  # noqa: E731
    table = Table("arm", "MB", "KL", "in mlx-lm", "top-1", *(f"to {peer} (95 %)" for peer in (*PEERS, "ours+none")))
    for arm, entry in sorted(results["ratios"].items(), key=lambda item: -item[1]["kl"]):
        table.add_row(arm, f"{entry['bytes'] / 1e6:.1f}", f"{entry['kl']:.4f}", f"{entry['kl_mlx']:.4f}",
                      f"{entry['top1']:.1%}", *(form(entry.get(f"to {peer}")) for peer in (*PEERS, "ours+none")))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0], "mlx_vs_mlx_lm")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--awq-samples", type=int, default=16)
    parser.add_argument("--mlx-windows", type=int, default=4)
    mx.set_default_device(mx.cpu)
    try:
        print_table(run(parser.parse_args()))
    except InputError as error:
        sys.exit(f"error: {error}")
