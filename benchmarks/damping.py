"""How much damping GPTQ wants: squared output error on calibration and on held-out text.

    python benchmarks/damping.py --text wiki.test.raw

Dithered SmolLM2-135M (`testbed.py`), a few layers, Hessians of the float model's activations on 48 × 256
calibration tokens and on 32 × 256 disjoint tokens (`texts.py`). For each damping the codes are chosen with
the first Hessian and judged by tr(ΔHΔᵀ) / tr(WHWᵀ) under both. Writes results/damping.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from testbed import build_testbed
from texts import calibration_text, evaluation_windows, load_text

from optrot_edge.models import forward, open_model
from optrot_edge.quantize.calibration import sample_windows
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.statistics import MeanProduct, output_error
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

LAYERS = (0, 3, 8, 14, 20, 26, 29)
DAMPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def hessian(x: torch.Tensor) -> torch.Tensor:
    """E[xxᵀ] of activations [windows, length, width]."""
    total = MeanProduct(x.shape[-1], x.shape[-1], "cpu")
    for part in x.split(8):
        total.add(part)
    return total.mean()


def problems(source, calibration: torch.Tensor, held_out: torch.Tensor):
    """(layer, names, stacked weights, calibration Hessian, held-out Hessian) of the chosen layers."""
    config, count = source.config, len(calibration)
    rope = forward.rope_tables(config, calibration.shape[1])
    x = F.embedding(torch.cat([calibration, held_out]), source.embedding())
    for index in range(config.num_hidden_layers):
        layer = source.layer(index)
        attention = forward.rms_norm(x, layer["attn_norm.weight"], config.rms_norm_eps)
        context = forward.attention_context(attention, layer, config, rope)
        x = x + forward.linear(context, layer, "o_proj")
        mlp = forward.rms_norm(x, layer["mlp_norm.weight"], config.rms_norm_eps)
        hidden = forward.mlp_hidden(mlp, layer)
        x = x + forward.linear(hidden, layer, "down_proj")
        if index in LAYERS:
            for names, inputs in ((("q_proj", "k_proj", "v_proj"), attention), (("o_proj",), context),
                                  (("gate_proj", "up_proj"), mlp), (("down_proj",), hidden)):
                weight = torch.cat([layer[f"{name}.weight"] for name in names])
                yield index, names, weight, hessian(inputs[:count]), hessian(inputs[count:])


@torch.no_grad()
def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="UTF-8 text file (default: WikiText-2, else a built-in text)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "damping.json")
    options = parser.parse_args()
    model, text = build_testbed(Path("out/bench/testbed"), seed=0, permuted=False), load_text(options.text)
    with LlamaCppBackend(model, vocab_only=True) as backend:
        held_out = torch.from_numpy(evaluation_windows(backend, text.evaluation, 32, 256))
        words = calibration_text(backend, text.calibration, 48, 256)
        calibration = torch.from_numpy(sample_windows(backend.tokenize(words), 48, 256, 0))
    sums = {(kind, damp): [0.0, 0.0] for kind in ("q4_0", "q4_1") for damp in (None, *DAMPS)}
    count = 0
    for _, _, weight, seen, unseen in problems(open_model(model), calibration, held_out):
        count += 1
        signals = output_error(weight, seen), output_error(weight, unseen)
        for (kind, damp), errors in sums.items():
            grid = Grid(kind)
            params = grid.fit(weight, seen.diagonal())
            codes = (grid.round(weight, params) if damp is None
                     else gptq(weight, prepare_hessian(seen, damp=damp), grid, params))
            delta = weight - grid.decode(codes, params)
            errors[0] += output_error(delta, seen) / signals[0]
            errors[1] += output_error(delta, unseen) / signals[1]
    rows = [{"type": kind, "damp": damp, "calibration": a / count, "held_out": b / count}
            for (kind, damp), (a, b) in sums.items()]
    table = Table("type", "damping", "calibration text", "held-out text", title="relative squared output error")
    for row in rows:
        label = "round to nearest" if row["damp"] is None else f"{row['damp']:g}"
        table.add_row(row["type"], label, f"{row['calibration']:.3e}", f"{row['held_out']:.3e}")
    Console().print(table)
    options.out.write_text(json.dumps({"text_sha256": text.sha256, "layers": LAYERS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
