"""Asymmetric calibration: weights that make up for the errors of what was quantised before them.

When a linear is quantised it reads x̃, where the float model reads x, and the residual stream it adds to is r̃, where
the float model's is r. GPTAQ (arXiv 2504.02692) lets it aim at W x nevertheless; here what writes to the residual
stream (o_proj, down_proj) makes up for r − r̃ too:

    W* = W + α V + β U,  V = W E[(x−x̃)x̃ᵀ] (H̃+λI)⁻¹,  U = E[(r−r̃)x̃ᵀ] (H̃+λI)⁻¹,  H̃ = E[x̃x̃ᵀ].

V and U have the noise of the calibration text in them. So they are computed on some of its windows, α and β by
least squares on the others (one in `HELD_OUT`; each between 0 and 1), and then V and U again on all.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.quantize.gptq import damped_cholesky
from optrot_edge.quantize.numerics import peak_of
from optrot_edge.quantize.statistics import MeanProduct

HELD_OUT = 8  # one calibration window in so many is kept to fit α and β on


def held_out_count(windows: int) -> int:
    """How many of the calibration windows α and β are fitted on; InputError when there is only one window."""
    if windows < 2:
        raise InputError("asymmetric calibration needs at least two windows (--nsamples): it fits on some and "
                         "checks on others")
    return max(1, windows // HELD_OUT)


class Moments:
    """What a linear's correction needs of some windows: H̃, E[(x−x̃)x̃ᵀ] and, for one that writes to the residual
    stream of `hidden` channels, E[(r−r̃)x̃ᵀ]. Without `float_inputs` only H̃. `peak` is the largest |x̃| or |x|."""

    def __init__(self, width: int, device, *, float_inputs: bool = False, hidden: int | None = None):
        self.peak = torch.zeros((), device=device)
        self.hessian = MeanProduct(width, width, device)
        self.input_gap = MeanProduct(width, width, device) if float_inputs else None
        self.stream_gap = None if hidden is None else MeanProduct(hidden, width, device)

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None = None, gap: torch.Tensor | None = None,
            weights: torch.Tensor | None = None) -> None:
        """Add x̃, x and r − r̃ of the same tokens, each [..., channels]; the last two where they are kept. `weights` of
        the tokens [...], which the products get; None for 1."""
        for inputs in (x, x_float):
            if inputs is not None:
                self.peak = torch.maximum(self.peak, peak_of(inputs).to(self.peak))
        if weights is not None:
            root = weights.sqrt()[..., None]
            x, x_float, gap = (None if part is None else root * part for part in (x, x_float, gap))
        self.hessian.add(x)
        if self.input_gap is not None:
            self.input_gap.add(x_float - x, x)
        if self.stream_gap is not None:
            self.stream_gap.add(gap, x)

    @property
    def products(self) -> dict[str, MeanProduct]:
        """What is kept, by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, MeanProduct)}

    @property
    def finite(self) -> bool:
        """Whether every sum of products is."""
        return all(bool(part.total.isfinite().all()) for part in self.products.values())

    def summed(self, world) -> Moments:
        """The same over the windows of all processes of `world`, a `rotations.distributed.World`."""
        whole = copy.copy(self)
        whole.peak = torch.tensor(world.maximum(float(self.peak)))
        for name, part in self.products.items():
            setattr(whole, name, part.summed(world))
        return whole

    def __add__(self, other: Moments) -> Moments:
        both = copy.copy(self)
        both.peak = torch.maximum(self.peak, other.peak)
        for name, mine in self.products.items():
            setattr(both, name, mine + vars(other)[name])
        return both


def mean_hessian(moments: list[Moments]) -> torch.Tensor | None:
    """H̃ over all windows; None without any."""
    if not moments:
        return None
    return sum((more.hessian for more in moments[1:]), start=moments[0].hessian).mean()


def input_sums(moments: list[Moments]) -> tuple[np.ndarray, int]:
    """Σ x̃² over all tokens of all windows, float32 [in], and the number of tokens."""
    hessian = sum((more.hessian for more in moments[1:]), start=moments[0].hessian)
    return hessian.total.diagonal().float().cpu().numpy(), hessian.tokens


def corrected(weights: dict[str, torch.Tensor], fit: Moments, held_out: Moments, damp: float) -> tuple[
        dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """W* of every matrix [out, in] in `weights`, which read one input, and {"alpha", "beta"} by name.

    `damp` is λ as a fraction of H̃'s mean diagonal; how often it had to grow, if it did, is added as
    "target_damp_escalations". `held_out` are other windows than `fit`. Raises InputError as `damped_cholesky` does.
    """
    fitted, final = _Corrections(fit, damp), _Corrections(fit + held_out, damp)
    found, factors = {}, {}
    for name, weight in weights.items():
        parts = fitted.parts(weight)
        best = _least_squares(parts, weight, held_out)
        found[name] = weight + sum(factor * part for factor, part in zip(best, final.parts(weight), strict=True))
        factors[name] = dict(zip(("alpha", "beta"), best, strict=False))
        if escalations := max(fitted.escalations, final.escalations):
            factors[name]["target_damp_escalations"] = escalations
    return found, factors


class _Corrections:
    """V and U from one set of windows."""

    def __init__(self, moments: Moments, damp: float):
        factor, _, self.escalations = damped_cholesky(moments.hessian.mean(), damp)
        self.by_input = torch.cholesky_solve(moments.input_gap.mean().T, factor).T
        self.of_stream = None
        if moments.stream_gap is not None:
            self.of_stream = torch.cholesky_solve(moments.stream_gap.mean().T, factor).T

    def parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """V and, where it writes to the residual stream, U of `weight`, in its dtype."""
        parts = [weight @ self.by_input.to(weight)]
        return parts if self.of_stream is None else [*parts, self.of_stream.to(weight)]


def _least_squares(parts: list[torch.Tensor], weight: torch.Tensor, held_out: Moments) -> list[float]:
    """Factors in [0, 1] of `parts` under which W* comes nearest to what is wanted on the held-out windows."""
    wanted = weight @ held_out.input_gap.mean().to(weight)
    if held_out.stream_gap is not None:
        wanted = wanted + held_out.stream_gap.mean().to(wanted)
    h = held_out.hessian.mean().to(weight)
    wide = widest_float(weight.device)
    dot = lambda a, b: (a * b).sum(dtype=wide)  # noqa: E731
    powers = [part @ h for part in parts]
    gram = torch.stack([torch.stack([dot(a, b) for b in parts]) for a in powers]).cpu()
    right = torch.stack([dot(wanted, part) for part in parts]).cpu()
    if not (gram.isfinite().all() and right.isfinite().all()):
        raise InputError("products of weights and activations overflow float32; the model is damaged")
    if not gram.any():
        return [0.0] * len(parts)  # the first layer reads what the float model reads
    if len(parts) == 1:
        return [float((right[0] / gram[0, 0]).clamp(0, 1))]
    return _best_in_square(gram, right)


def _best_in_square(gram: torch.Tensor, right: torch.Tensor) -> list[float]:
    """Minimum of `½ fᵀ G f − rᵀ f` over 0 ≤ f ≤ 1, for two factors: inside, or on one of the sides.

    In plain floats: LAPACK's last bit depends on where in memory its arrays lie, and a run that is resumed must not.
    """
    g, r, candidates = gram.tolist(), right.tolist(), []
    determinant = g[0][0] * g[1][1] - g[0][1] * g[1][0]
    if determinant > 1e-12 * g[0][0] * g[1][1]:  # else the minimum is on a side too
        inside = ((r[0] * g[1][1] - r[1] * g[0][1]) / determinant, (r[1] * g[0][0] - r[0] * g[1][0]) / determinant)
        if all(0 <= factor <= 1 for factor in inside):
            candidates.append(list(inside))
    for fixed, free in ((0, 1), (1, 0)):
        for value in (0.0, 1.0):
            point = [value, value]
            rest, slope = r[free] - g[free][fixed] * value, g[free][free]
            point[free] = min(max(rest / slope, 0.0), 1.0) if slope else 0.0
            candidates.append(point)
    return min(candidates, key=lambda f: sum(
        f[i] * (sum(g[i][j] * f[j] for j in (0, 1)) / 2 - r[i]) for i in (0, 1)))
