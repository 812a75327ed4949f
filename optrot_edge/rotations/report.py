"""What a rotation does to every matrix, before any quantisation: μ_W, μ_H, kurtosis, tr D (OptRot, arXiv 2512.24124).

"Before" is the model as stored: W with the norm gains apart, inputs with the gains applied. "After" is
what `RotatedModel` gives. GPTQ's expected loss goes with `‖W‖_F² · tr D` on a given kind of grid, so the
ratio of that product after to before says what the rotation costs (above 1) or saves in the inputs'
geometry; a grid that fits the rotated weights better comes on top.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from optrot_edge.errors import InputError
from optrot_edge.quantize.gptq import prepare_hessian
from optrot_edge.quantize.sequential import LINEARS
from optrot_edge.quantize.statistics import incoherence, kurtosis
from optrot_edge.rotations.covariance import INPUTS, Covariances, rotate_covariances
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.rotation import Rotation

INPUT_QUANTITIES = ("mu_h", "lambda_max", "tr_d", "tr_h", "tr_d_over_tr_h", "damp_escalations")
SUMMARISED = ("mu_w", "kurtosis", "mu_h", "mu_w_mu_h", "tr_d_over_tr_h")


def spectrum(hessian: torch.Tensor, tokens: int | None = None) -> tuple[float, float]:
    """μ_H = max|Q|·√n over the eigenvectors Q of H [n, n], √n when one of them is a coordinate axis; and λ_max(H).

    When H is a mean over `tokens` < n, its n − tokens null directions have no eigenvectors of their own
    and are left out. The decomposition is done in H's dtype where H lies, about 10 n³ operations: 0.6 s
    for n = 1,536 on one CPU core (float64), so about ten minutes for the 14,336 of an 8B model's
    down_proj; use a GPU there, or leave μ_H out.
    """
    values, vectors = torch.linalg.eigh(hessian)  # eigenvalues ascend
    if tokens is not None and tokens < len(hessian):
        vectors = vectors[:, len(hessian) - tokens:]
    return float(vectors.abs().max()) * math.sqrt(len(hessian)), float(values[-1])


def input_quantities(hessian: torch.Tensor, *, damp: float, act_order: bool, tokens: int | None = None,
                     mu_h: bool = True) -> dict:
    """`INPUT_QUANTITIES` of H [n, n]: μ_H, λ_max, Σ D_j as GPTQ with this damping and order has it, tr H."""
    prepared = prepare_hessian(hessian, damp=damp, act_order=act_order)
    mu, largest = spectrum(hessian, tokens) if mu_h else (None, None)
    return {"mu_h": mu, "lambda_max": largest,
            "tr_d": float(prepared.column_cost.sum()), "tr_h": float(hessian.diagonal().sum()),
            "tr_d_over_tr_h": prepared.feedback_gain(hessian), "damp_escalations": prepared.escalations}


def matrix_quantities(weight: torch.Tensor, inputs: dict | None) -> dict:
    """μ_W, kurtosis, ‖W‖_F and, of its `inputs`, `INPUT_QUANTITIES` (None without) and μ_W μ_H."""
    entry = {"mu_w": incoherence(weight), "kurtosis": kurtosis(weight), "frobenius": float(weight.norm())}
    entry |= inputs or dict.fromkeys(INPUT_QUANTITIES)
    entry["mu_w_mu_h"] = None if entry["mu_h"] is None else entry["mu_w"] * entry["mu_h"]
    return entry


def _cost_ratio(before: dict, after: dict) -> float | None:
    """`‖W'‖_F² tr D' / (‖W‖_F² tr D)`."""
    if before["tr_d"] is None:
        return None
    costs = [entry["frobenius"] ** 2 * entry["tr_d"] for entry in (before, after)]
    return costs[1] / costs[0] if costs[0] else None


def measure(source, rotation: Rotation, covariances: Covariances | None, *, damp: float = 0.1, act_order: bool = True,
            mu_h: bool = True, device: str = "cpu", progress: Callable[[int, int], None] | None = None) -> list[dict]:
    """A row per layer and matrix: `layer`, `matrix`, `before`, `after` (quantities) and `tr_d_ratio`.

    Without `covariances`, or for μ_H and λ_max with `mu_h` False, the quantities of the inputs are None. Up to
    eight float64 factorisations per layer, and as many eigendecompositions (see
    `spectrum`); inputs that the rotation leaves alone are done once.
    Raises InputError when a covariance cannot be factorised.
    """
    rotated = RotatedModel(source, rotation, device)
    rows: list[dict] = []
    for index in range(source.config.num_hidden_layers):
        layers = (source.layer(index), rotated.layer(index))
        inputs: dict[str, list] = {name: [None, None] for name in INPUTS}
        if covariances is not None:
            inputs = _layer_inputs(covariances, index, layers, rotation, source.config,
                                   dict(damp=damp, act_order=act_order, tokens=covariances.tokens, mu_h=mu_h), device)
        for kind, names in INPUTS.items():
            for name in names:
                before, after = (matrix_quantities(layer[f"{name}.weight"], found)
                                 for layer, found in zip(layers, inputs[kind], strict=True))
                rows.append({"layer": index, "matrix": name, "before": before, "after": after,
                             "tr_d_ratio": _cost_ratio(before, after)})
        if progress:
            progress(index + 1, source.config.num_hidden_layers)
    return rows


def _layer_inputs(covariances: Covariances, index: int, layers, rotation: Rotation, config, options: dict,
                  device: str) -> dict[str, list]:
    """Quantities [before, after] of the layer's four inputs; `layers` is (native, rotated)."""
    device = "cpu" if torch.device(device).type == "mps" else device  # Metal: no float64, no eigh
    stored = covariances.layer(index, device)
    before = rotate_covariances(stored, Rotation("none"), index, layers[0], config)
    after = rotate_covariances(stored, rotation, index, layers[1], config)
    found = {}
    for name in INPUTS:
        native = input_quantities(before[name], **options)
        same = torch.equal(before[name], after[name])
        found[name] = [native, native if same else input_quantities(after[name], **options)]
    return found


def summarise(rows: list[dict]) -> list[dict]:
    """Medians over the layers, a row per matrix: `matrix`, "NAME_before", "NAME_after", "tr_d_ratio"."""
    def median(values):
        values = [value for value in values if value is not None]
        return statistics.median(values) if values else None

    summary = []
    for name in LINEARS:
        of = [row for row in rows if row["matrix"] == name]
        entry = {"matrix": name}
        for quantity in SUMMARISED:
            for when in ("before", "after"):
                entry[f"{quantity}_{when}"] = median(row[when][quantity] for row in of)
        summary.append(entry | {"tr_d_ratio": median(row["tr_d_ratio"] for row in of)})
    return summary


def report_paths(out: str | Path) -> tuple[Path, Path]:
    """Where the report (.json) and its figure (.png) of the rotation file `out` lie: beside it, same stem."""
    out = Path(out)
    stem = out.with_suffix("") if out.suffix == ".safetensors" else out
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")


def write_report(out: str | Path, report: dict) -> dict:
    """Draw and write `report` beside the rotation file `out`; returns it with `figure` and `notes` completed.

    `report` holds `rotation`, `recipe`, `notes` and `layers` (rows of `measure`). Without matplotlib there
    is no figure, and a note says so. Raises InputError when a file cannot be written.
    """
    from optrot_edge.rotations.figure import draw

    written, figure = report_paths(out)
    report = {**report, "figure": figure.name, "notes": list(report["notes"])}
    try:
        _replace(figure, lambda partial: draw(report, partial))
    except ImportError as error:
        report["figure"] = None
        report["notes"].append(f'no figure was drawn ({error}): pip install "optrot-edge[learn]"')
    text = json.dumps(report, indent=1) + "\n"
    _replace(written, lambda partial: partial.write_text(text, encoding="utf-8"))
    return report


def read_summary(out: str | Path) -> dict:
    """The short form of the report beside the rotation file `out`: its paths, notes, and medians per matrix."""
    written, figure = report_paths(out)
    report = json.loads(written.read_text(encoding="utf-8"))
    return {"report": str(written), "figure": str(figure) if report["figure"] else None, "notes": report["notes"],
            "matrices": report["summary"]}


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file that then takes the name `path`."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
