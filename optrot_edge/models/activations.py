"""Per-token fake quantisation of what the decoder's linears read (A8, A4); the head stays in float.

Round-to-nearest with a step and an integer zero-point per token, from the token's own smallest and largest entry, as
SpinQuant's code does (arXiv 2405.16406, its `ActQuantizer` with `a_asym`, clip ratio 1). The range always holds 0.
One input is quantised once for all linears that read it.
"""

from __future__ import annotations

import torch

from optrot_edge.errors import InputError

FLOAT = 16  # bits that stand for "not quantised"


def check_activations(bits: int) -> int:
    """`bits`; InputError unless activations can be rounded to them."""
    if bits != FLOAT and bits not in range(2, 9):
        raise InputError(f"activations of {bits} bits: use 8 or 4 (2 to 8 will do), or 16 for none of it")
    return bits


def token_grid(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and (float) zero-point [..., 1] of every token of `x` [..., n]; a token of zeros has step 1."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step == 0, 1.0, step)
    return step, (-low / step).round()


@torch.no_grad()
def fake_quantize_tokens(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`x` [..., n], every token on its 2^bits levels: `s · (clamp(round(x / s) + z, 0, 2^bits − 1) − z)`."""
    return _on_levels(x, *token_grid(x, bits), bits)


def _on_levels(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    codes = torch.minimum(torch.maximum((x / step).round_(), -zero), 2**bits - 1 - zero)
    return codes.mul_(step)


def rounding_error(x: torch.Tensor, bits: int, *, through_range: bool = False) -> torch.Tensor:
    """`fake_quantize_tokens(x) − x`, without a gradient.

    `through_range`: with that of the step, the error in units of the step held fixed, as in quantisers that only pass
    straight through the rounding: a token's error then shrinks with its range.
    """
    with torch.set_grad_enabled(through_range and torch.is_grad_enabled()):
        step, zero = token_grid(x, bits)
    with torch.no_grad():
        error = _on_levels(x, step, zero, bits).sub_(x)
        if through_range:
            error.div_(step)
    return error * step if through_range else error


class InputQuantizer:
    """What `forward` calls on every linear's input, under a layer's key "input": it fake-quantises the input.

    `transforms`, by kind of input ("attn", "o", "mlp", "down"), are objects with `apply(x)` and `undo(x)`: such an
    input is quantised in the basis that `apply` leads to. `bits` 16 leaves all as it is.
    """

    def __init__(self, bits: int, transforms: dict | None = None):
        self.bits, self.transforms = check_activations(bits), transforms or {}

    def __call__(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        if self.bits == FLOAT:
            return x
        transform = self.transforms.get(kind)
        if transform is None:
            return fake_quantize_tokens(x, self.bits)
        return transform.undo(fake_quantize_tokens(transform.apply(x), self.bits))
