"""Block Walsh-Hadamard transform of activations: what the online rotations R3 and R4 compute."""

from __future__ import annotations

import torch

from optrot_edge.kernels.fourth_power import device_of, require_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # see fourth_power.py
    triton = None

TRITON_BLOCKS = (32, 64, 128, 256, 512, 1024)
_TILE = 4096  # elements per program


def block_hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Normalised Walsh-Hadamard (Sylvester order) over blocks of the last axis of `x` [..., n].

    `block` is a power of two that divides n. Returns a new tensor of x's shape and dtype; half
    precision is transformed in float32. Symmetric and orthogonal, so it is its own inverse.
    Runs in Triton on CUDA (blocks 32 to 1024, no gradient), else in torch.
    Raises ValueError when `block` does not fit.
    """
    if (triton is not None and x.is_cuda and block in TRITON_BLOCKS and x.dtype != torch.float64
            and not (torch.is_grad_enabled() and x.requires_grad)):
        return block_hadamard_triton(x, block)
    return block_hadamard_torch(x, block)


def block_hadamard_torch(x: torch.Tensor, block: int) -> torch.Tensor:
    """The twin of `block_hadamard_triton`; any power of two, differentiable. See `block_hadamard`."""
    _check(x, block)
    shape, dtype = x.shape, x.dtype
    y = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    y = y.reshape(-1, shape[-1] // block, block)
    step = 1
    while step < block:
        y = y.reshape(-1, shape[-1] // (2 * step), 2, step)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], dim=2)
        step *= 2
    return (y.reshape(shape) * block**-0.5).to(dtype)


def block_hadamard_triton(x: torch.Tensor, block: int) -> torch.Tensor:
    """`block_hadamard` of a CUDA tensor (or, under TRITON_INTERPRET=1, a CPU one), without gradient.

    `block` is 32, 64, ... 1024; x is float32, float16 or bfloat16.
    """
    _check(x, block)
    require_triton(x)
    if block not in TRITON_BLOCKS or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"block {block} of {x.dtype}: the Triton kernel takes blocks of 32 to 1024 in "
                         "float32, float16 or bfloat16; use block_hadamard_torch")
    x = x.detach().contiguous()
    y = torch.empty_like(x)
    count, rows = x.numel() // block, max(_TILE // block, 1)
    if count:
        with device_of(x):
            _hadamard_kernel[(triton.cdiv(count, rows),)](
                x, y, count, block**-0.5, ROWS=rows, BLOCK=block, STAGES=block.bit_length() - 1, num_warps=4)
    return y


def _check(x: torch.Tensor, block: int) -> None:
    if block < 1 or block & (block - 1) or x.ndim < 1 or x.shape[-1] % block:
        raise ValueError(f"block {block} for x {tuple(x.shape)}: a power of two that divides the last axis "
                         "is needed")


if triton is not None:
    @triton.jit
    def _hadamard_kernel(x, y, count, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + index, mask=rows[:, None] < count, other=0.0).to(tl.float32)
        # Constant geometry: every stage adds and subtracts neighbours and puts sums before
        # differences, which rotates the index bits by one; after all stages they are back in place.
        for _ in tl.static_range(STAGES):
            even, odd = tl.split(tl.reshape(value, (ROWS, BLOCK // 2, 2)))
            value = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, BLOCK))
        tl.store(y + index, (value * scale).to(y.dtype.element_ty), mask=rows[:, None] < count)
