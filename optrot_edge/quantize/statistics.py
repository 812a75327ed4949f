"""Second moments of activations, and per-matrix quantities for the report (OptRot, arXiv 2512.24124, section 3)."""

from __future__ import annotations

import copy
import math

import torch

from optrot_edge.device import widest_float


class MeanProduct:
    """E[a bᵀ] accumulated over tokens: float32 products, sums in float64 where the device has it."""

    def __init__(self, rows: int, columns: int, device):
        self.total = torch.zeros(rows, columns, dtype=widest_float(device), device=device)
        self.tokens = 0

    def add(self, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
        """Add activations [..., rows] and [..., columns]; the same twice for a Hessian E[xxᵀ]."""
        right = left if right is None else right
        left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
        self.total += (left.T @ right).to(self.total)
        self.tokens += len(left)

    def __add__(self, other: MeanProduct) -> MeanProduct:
        both = MeanProduct(*self.total.shape, self.total.device)
        both.total, both.tokens = self.total + other.total, self.tokens + other.tokens
        return both

    def summed(self, world) -> MeanProduct:
        """The same over the tokens of all processes of `world`, a `rotations.distributed.World`."""
        both = copy.copy(self)
        both.total = world.sum(self.total)
        both.tokens = int(world.sum(torch.tensor(self.tokens)))
        return both

    def mean(self) -> torch.Tensor:
        """E[a bᵀ] [rows, columns]."""
        return self.total / self.tokens


def incoherence(weight: torch.Tensor) -> float:
    """μ_W = max|W|·√(mn) / ‖W‖_F: 1 for a flat matrix, √(mn) for a single spike."""
    norm = float(weight.norm())
    return float(weight.abs().max()) * math.sqrt(weight.numel()) / norm if norm else 1.0


def kurtosis(weight: torch.Tensor) -> float:
    """E[w⁴] / E[w²]²: 3 for a Gaussian."""
    wide = widest_float(weight.device)
    second = float(weight.square().mean(dtype=wide))
    return float(weight.square().square().mean(dtype=wide)) / second**2 if second else 0.0


def output_error(delta: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(Δ H Δᵀ) = E‖Δx‖², the layer's mean squared output error."""
    hessian = hessian.to(delta.dtype)
    return float(((delta @ hessian) * delta).sum(dtype=widest_float(delta.device)))


def matrix_report(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor | None) -> dict:
    """`snr_db` = 10 log10(tr WHWᵀ / tr ΔHΔᵀ) (H = I without calibration), relative MSE, μ_W, kurtosis."""
    wide = widest_float(weight.device)
    if hessian is None:
        hessian = torch.eye(weight.shape[1], dtype=wide, device=weight.device)
    signal, noise = output_error(weight, hessian), output_error(weight - decoded, hessian)
    snr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    power = float(weight.square().sum(dtype=wide))
    mse = float((weight - decoded).square().sum(dtype=wide)) / power if power else 0.0
    return {"snr_db": snr, "output_error": noise, "relative_mse": mse,
            "mu_w": incoherence(weight), "kurtosis": kurtosis(weight)}
