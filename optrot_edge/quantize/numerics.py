"""Numerical trouble while quantising: found where it arises, refused by name, or told in the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch

from optrot_edge.errors import InputError
from optrot_edge.quantize.statistics import matrix_report, output_error

FLOAT16_MAX = 65504.0
NAMED = 8  # tensors that a warning names; the report has them all
WEIGHT_LIMIT = 1e9  # the fourth power of a weight is summed in float32
SLACK = 1e-5  # two output errors this close are equal: they are sums of float32 products


class NamedError(InputError):
    """An InputError that says which tensor it is about."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """An InputError from inside says that it is about `name`, a tensor or the matrices that read one input; of nested
    names the innermost."""
    try:
        yield
    except NamedError:
        raise
    except InputError as error:
        raise NamedError(f"{name}: {error}") from None


def peak_of(x: torch.Tensor) -> torch.Tensor:
    """max |x|, a scalar tensor; NaN or infinity when `x` holds any."""
    return torch.linalg.vector_norm(x, float("inf"))


def as_float(weight: torch.Tensor, dtype: str) -> np.ndarray:
    """numpy array in a float storage type, bf16 as float32 that holds the same; InputError for values that are not
    finite in it."""
    stored = weight.half() if dtype == "f16" else weight.bfloat16().float() if dtype == "bf16" else weight.float()
    if not stored.isfinite().all():
        raise InputError("weights exceed the range of f16; keep them as f32" if dtype == "f16" else
                         "values exceed the range of float32; the model is damaged")
    return stored.cpu().numpy()


def check_weights(weight: torch.Tensor) -> None:
    """InputError for weights that are not finite, or absurd."""
    peak = float(peak_of(weight))
    if not math.isfinite(peak):
        raise InputError("the weights hold NaN or infinity; the model is damaged")
    if peak > WEIGHT_LIMIT:
        raise InputError(f"weights of up to {peak:.2g} are more than float32 arithmetic can take; the model is damaged")


def within_range(importance: torch.Tensor) -> torch.Tensor:
    """`importance` (≥ 0) times the power of two that puts its largest entry near 2^20: the search for scales squares
    sums of it, which float32 would not hold for inputs beyond 1e9 or below 1e-9. Nothing else changes.

    Raises InputError when it is not finite.
    """
    peak = float(importance.max())
    if not math.isfinite(peak):
        raise InputError("the importance of the inputs is not finite; the model overflows or is damaged")
    return importance * 2.0 ** (20 - math.frexp(peak)[1]) if peak > 0 else importance


def refuse_overflow(layer: dict, index: int | None, source) -> NoReturn:
    """The InputError for activations, or sums of their products, that are not finite.

    Calibration computes in float32, so that takes weights that no trained model has: the error names the largest of
    `layer` (tensors by canonical name; decoder layer `index` of `source`) and how it is stored.
    """
    weights = {name: float(peak_of(part)) for name, part in layer.items()}
    name = max(weights, key=weights.get)
    full = name if index is None else f"layers.{index}.{name}"
    raise InputError("calibration produced non-finite activations here (NaN, or too large for products in float32); "
                     f"the largest weight is {weights[name]:.2g}, in {full}, stored as {source.stored_dtype(full)}. "
                     "The model is damaged, or overflowed when it was converted: take the original weights, in "
                     "bfloat16 or float32")


def tensor_report(weight: torch.Tensor, decoded: torch.Tensor, rounded: torch.Tensor | None, hessian,
                  more: dict) -> dict:
    """`matrix_report`, GPTQ's error against that of the `rounded` weights where there are any, and `more`.

    Raises InputError when an error is not finite.
    """
    report = matrix_report(weight, decoded, hessian)
    if rounded is not None:
        report |= against_rounding(report["output_error"], output_error(weight - rounded, hessian))
    if not all(math.isfinite(value) for value in report.values() if isinstance(value, float)):
        raise InputError("products of weights and activations overflow float32; the model is damaged")
    return report | more


def against_rounding(error: float, rounded_error: float) -> dict:
    """What the report says of GPTQ's output error beside round-to-nearest's: both tr(ΔHΔᵀ), on the same H and away
    from the same target (with asymmetric calibration W*, which rounding gets to aim at too), the rounding on the grid
    as it was first fitted."""
    return {"rtn_output_error": rounded_error, "worse_than_rtn": error > rounded_error * (1 + SLACK)}


def shared_report(prepared, hessian, moments: list = ()) -> dict:
    """What the report says of all matrices that share an input: the PreparedHessian's part, None without GPTQ, and
    the largest magnitude in the `moments`."""
    found = {} if prepared is None else {"damp": prepared.damp, "damp_escalations": prepared.escalations,
                                         "dead_columns": int(prepared.dead.sum()),
                                         "tr_d_over_tr_h": prepared.feedback_gain(hessian)}
    return found | ({"input_peak": max(float(one.peak) for one in moments)} if moments else {})


def warnings_of(reports: dict[str, dict]) -> list[str]:
    """One sentence per kind of trouble in the `reports` by tensor; empty when there was none."""
    found = []

    def say(what: str, advice: str, values: dict[str, str]) -> None:
        if values:
            named = ", ".join(f"{name} ({value})" for name, value in list(values.items())[:NAMED])
            named += f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
            found.append(f"{what}: {named}; {advice}")

    say("GPTQ left a larger output error than round-to-nearest would have",
        "other or more calibration text, or another --damp, may help",
        {name: f"{report['output_error'] / report['rtn_output_error']:.2f} times" if report["rtn_output_error"]
         else "rounding has none" for name, report in reports.items() if report.get("worse_than_rtn")})
    say("damping had to grow tenfold, once or more", "the Hessian is ill-conditioned; use more calibration text",
        {name: f"to {report['damp']:.2g}" if report.get("damp_escalations") else "of the corrected target"
         for name, report in reports.items()
         if report.get("damp_escalations") or report.get("target_damp_escalations")})
    say("activations exceed float16's largest number, 65504", "run the package in bfloat16 or float32, not in float16",
        {name: f"{peak:.2g}" for name, report in reports.items()
         if (peak := max(report.get("input_peak", 0.0), report.get("stream_peak", 0.0))) > FLOAT16_MAX})
    return found
