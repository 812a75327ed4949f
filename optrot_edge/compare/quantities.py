"""Per layer and matrix: what a rotation makes of weights and inputs, and what quantising then loses.

All on the inputs of the float model, `H = E[xxᵀ]` in the rotated basis, so that arms differ in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from optrot_edge.quantize.statistics import output_error
from optrot_edge.rotations.covariance import INPUTS, Covariances, rotate_covariances
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.report import input_quantities, matrix_quantities
from optrot_edge.rotations.rotation import Rotation

Progress = Callable[[int, int], None]


def _layers(source, rotation: Rotation, covariances: Covariances, device: str,
            progress: Progress | None) -> Iterator[tuple[int, dict, dict]]:
    """(index, rotated layer, covariances of its inputs) of every layer."""
    device = "cpu" if torch.device(device).type == "mps" else device  # Metal: no float64, no eigh
    model, layers = RotatedModel(source, rotation, device), source.config.num_hidden_layers
    for index in range(layers):
        layer = model.layer(index)
        yield index, layer, rotate_covariances(covariances.layer(index, device), rotation, index, layer, source.config)
        if progress:
            progress(index + 1, layers)


def arm_quantities(source, rotation: Rotation, covariances: Covariances, *, damp: float = 0.01, act_order: bool = True,
                   mu_h: bool = True, device: str = "cpu", progress: Progress | None = None) -> list[dict]:
    """A row per layer and matrix of `source` under `rotation`: `layer`, `matrix`, μ_W, kurtosis, ‖W‖_F, μ_H, λ_max,
    μ_W μ_H, tr D, tr H (see `optrot_edge.rotations.report`); without `mu_h` eigenvectors and λ_max are None.

    Raises InputError when a covariance cannot be factorised.
    """
    rows = []
    for index, layer, inputs in _layers(source, rotation, covariances, device, progress):
        for kind, names in INPUTS.items():
            found = input_quantities(inputs[kind], damp=damp, act_order=act_order, tokens=covariances.tokens, mu_h=mu_h)
            rows += [{"layer": index, "matrix": name} | matrix_quantities(layer[f"{name}.weight"], found)
                     for name in names]
    return rows


def rtn_bound(quantities: dict, bits: int) -> float | None:
    """`μ_W² λ_max(H) ‖W‖_F² / (2^b − 1)²`, the most that tr(ΔHΔᵀ) can be when every weight is rounded to the nearest of
    2^b even levels between the extremes of its group; None where λ_max was not measured.

    A step is at most 2 max|W| / (2^b − 1), an error half of it, so ‖Δ‖_F² ≤ mn max|W|² / (2^b − 1)² = μ_W² ‖W‖_F² /
    (2^b − 1)², and tr(ΔHΔᵀ) ≤ λ_max ‖Δ‖_F² (OptRot, arXiv 2512.24124).
    """
    largest = quantities["lambda_max"]
    if largest is None:
        return None
    return quantities["mu_w"] ** 2 * largest * quantities["frobenius"] ** 2 / (2**bits - 1) ** 2


def decibels(signal: float, noise: float | None) -> float | None:
    """10 log10(signal / noise); None where either is nothing."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise else None


def quantization_errors(source, rotation: Rotation, quantized, covariances: Covariances, quantities: list[dict],
                        bits: int, *, device: str = "cpu", progress: Progress | None = None) -> list[dict]:
    """A row per layer and matrix of a model, decoded layer by layer with `quantized.layer(index)`, that was made under
    `rotation`: `signal` tr(WHWᵀ), `error` tr((W−Ŵ)H(W−Ŵ)ᵀ), `snr_db`, and from the arm's `quantities` (empty: none)
    `rtn_bound` and the SNR that it promises, `bound_db`."""
    rows, known = [], {(row["layer"], row["matrix"]): row for row in quantities}
    for index, layer, inputs in _layers(source, rotation, covariances, device, progress):
        found = quantized.layer(index)
        for kind, names in INPUTS.items():
            for name in names:
                weight = layer[f"{name}.weight"].to(inputs[kind])
                decoded = found[f"{name}.weight"].to(weight)
                signal, error = (output_error(w, inputs[kind]) for w in (weight, weight - decoded))
                bound = rtn_bound(known[index, name], bits) if known else None
                rows.append({"layer": index, "matrix": name, "signal": signal, "error": error, "rtn_bound": bound,
                             "snr_db": decibels(signal, error), "bound_db": decibels(signal, bound)})
    return rows
