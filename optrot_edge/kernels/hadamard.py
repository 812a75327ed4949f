"""Block Walsh-Hadamard transform of activations: what the online rotations R3 and R4 compute."""

from __future__ import annotations

import functools

import torch

from optrot_edge.kernels.launch import HALF_DTYPES, check_out, device_of, require_triton, runs_triton
from optrot_edge.sylvester import sylvester

try:
    import triton
    import triton.language as tl
except ImportError:  # see launch.py
    triton = None

TRITON_DTYPES = (torch.float32, *HALF_DTYPES)
LARGEST_CORE = 64  # a larger core is a matrix product, which the twin leaves to cuBLAS
_TILE = 4096  # elements per program, unless one block is larger
_FACTOR = 32  # order of the twin's products
_LARGEST_TILE = 16384  # in float32 it fits the shared memory of a consumer GPU (99 KiB)


def block_hadamard(x: torch.Tensor, block: int, *, core: torch.Tensor | None = None,
                   out: torch.Tensor | None = None) -> torch.Tensor:
    """Normalised Walsh-Hadamard transform over blocks of the last axis of `x` [..., n].

    Without `core`, `block` is a power of two that divides n, and each block is multiplied by Sylvester's
    matrix over √block: symmetric and orthogonal, so its own inverse. With `core` [m, m], a Hadamard
    matrix of ±1 on x's device, `block` is m·2^k and each block, a row, is multiplied from the right by
    kron(Sylvester 2^k, core) / √block; `core.T` gives the inverse.

    Returns a tensor of x's shape and dtype: `out` if given (x itself for a transform in place, or memory
    apart from it), else a new one. Half precision is transformed in float32 and rounded once.
    Runs in Triton on CUDA (float32, float16, bfloat16; m up to 64; no gradient), else in torch.
    Raises ValueError when `block`, `core` or `out` does not fit.
    """
    order = _checked_order(x, block, core, out)
    fits = runs_triton(x, TRITON_DTYPES) and block > 1 and order <= LARGEST_CORE
    return (block_hadamard_triton if fits else block_hadamard_torch)(x, block, core=core, out=out)


def block_hadamard_torch(x: torch.Tensor, block: int, *, core: torch.Tensor | None = None,
                         out: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `block_hadamard_triton`; any core, float64 too, differentiable. See `block_hadamard`."""
    step = _checked_order(x, block, core, out)
    shape, dtype = x.shape, x.dtype
    y = x.float() if dtype in HALF_DTYPES else x
    if core is not None:
        y = y.reshape(-1, step) @ core.to(y.dtype)
    while step < block:
        factor = _signs(min(_FACTOR, block // step)).to(y)
        y = y.reshape(-1, len(factor)) @ factor if step == 1 else factor @ y.reshape(-1, len(factor), step)
        step *= len(factor)
    y = (y.reshape(shape) * block**-0.5).to(dtype)
    return y if out is None else out.copy_(y)


@functools.cache
def _signs(order: int) -> torch.Tensor:
    """Sylvester's matrix of ±1."""
    return torch.from_numpy(sylvester(order)).sign()


@torch.no_grad()
def block_hadamard_triton(x: torch.Tensor, block: int, *, core: torch.Tensor | None = None,
                          out: torch.Tensor | None = None) -> torch.Tensor:
    """`block_hadamard` of a CUDA tensor (or, under TRITON_INTERPRET=1, a CPU one), without gradient.

    `block` is at least 2, core at most [64, 64], x float32, float16 or bfloat16. A block of up to 16384
    elements is read and written once, a larger one twice, by way of a float32 copy of a half x.
    """
    order = _checked_order(x, block, core, out)
    require_triton(x)
    if block < 2 or order > LARGEST_CORE or x.dtype not in TRITON_DTYPES:
        raise ValueError(f"block {block}, core of {order}, {x.dtype}: the Triton kernel takes blocks of 2 and "
                         "more, cores of up to 64, float32, float16 or bfloat16; use block_hadamard_torch")
    x = x.detach().contiguous()
    y = out if out is not None and out.is_contiguous() else torch.empty_like(x)
    inner, outer = split_block(block // order, order)
    between = y if outer == 1 or x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    if x.numel():
        with device_of(x):
            if core is None:
                _transform(x, between, 1, inner, block**-0.5)
            else:
                _transform_core(x, between, core.to(torch.float32).contiguous(), inner, block**-0.5)
            if outer > 1:
                _transform(between, y, inner * order, outer, 1.0)
    return y if out is None or y is out else out.copy_(y)


def split_block(power: int, order: int) -> tuple[int, int]:
    """Factors of the power of two `power`: the one of the first pass, next to the core, and the second's."""
    widest = _LARGEST_TILE if order == 1 else _LARGEST_TILE // padded(order)
    inner = min(power, widest)
    return inner, power // inner


def padded(order: int) -> int:
    """Side of the power-of-two square that holds a core; Triton's products start at 16."""
    return max(16, triton.next_power_of_2(order))


def tile_warps(elements: int) -> int:
    """Warps of a program of so many elements: at most 32 of them per thread."""
    return min(16, max(4, elements // 1024))


def _transform(x: torch.Tensor, y: torch.Tensor, stride: int, block: int, scale: float) -> None:
    """Sylvester's butterflies over the `block` elements `stride` apart in every run of block·stride."""
    count, rows = x.numel() // block, max(_TILE // block, 1)
    _hadamard_kernel[(triton.cdiv(count, rows),)](
        x, y, count, scale, STRIDE=stride, ROWS=rows, BLOCK=block, STAGES=block.bit_length() - 1,
        num_warps=tile_warps(rows * block))


def _transform_core(x: torch.Tensor, y: torch.Tensor, core: torch.Tensor, power: int, scale: float) -> None:
    """kron(Sylvester `power`, core) over every run of power·m elements."""
    order = len(core)
    side = padded(order)
    groups = max(1, _TILE // (side * power))
    count = x.numel() // (power * order)
    _hadamard_core_kernel[(triton.cdiv(count, groups),)](
        x, y, core, count, scale, ORDER=order, SIDE=side, GROUPS=groups, POWER=power,
        STAGES=power.bit_length() - 1, UPCAST=not x.is_cuda, num_warps=tile_warps(side * groups * power))


def _checked_order(x: torch.Tensor, block: int, core: torch.Tensor | None, out: torch.Tensor | None) -> int:
    """The order of `core` (1 without); ValueError unless everything fits."""
    check_out(x, out)
    order = 1
    if core is not None:
        if core.ndim != 2 or core.shape[0] != core.shape[1] or not core.numel() or core.device != x.device:
            raise ValueError(f"core {tuple(core.shape)} on {core.device}: a square matrix on {x.device} is needed")
        order = len(core)
    power = block // order
    if power < 1 or power & (power - 1) or power * order != block or x.ndim < 1 or x.shape[-1] % block:
        times = "" if core is None else f"{order} times "
        raise ValueError(f"block {block} for x {tuple(x.shape)}: {times}a power of two that divides the last "
                         "axis is needed")
    return order


if triton is not None:
    @triton.jit
    def _butterflies(value, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
        # Constant geometry: every stage adds and subtracts neighbours and puts sums before
        # differences, which rotates the index bits by one; after all stages they are back in place.
        for _ in tl.static_range(STAGES):
            even, odd = tl.split(tl.reshape(value, (ROWS, BLOCK // 2, 2)))
            value = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, BLOCK))
        return value

    @triton.jit
    def _hadamard_kernel(x, y, count, scale, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                         STAGES: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        first = rows // STRIDE * (STRIDE * BLOCK) + rows % STRIDE
        index = first[:, None] + tl.arange(0, BLOCK)[None, :] * STRIDE
        # All of a block is read before any of it is written, so y may be x.
        value = tl.load(x + index, mask=rows[:, None] < count, other=0.0).to(tl.float32)
        value = _butterflies(value, ROWS, BLOCK, STAGES) * scale
        tl.store(y + index, value.to(y.dtype.element_ty), mask=rows[:, None] < count)

    @triton.jit
    def _hadamard_core_kernel(x, y, core, count, scale, ORDER: tl.constexpr, SIDE: tl.constexpr,
                              GROUPS: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr,
                              UPCAST: tl.constexpr):
        group = tl.program_id(0).to(tl.int64) * GROUPS
        lane = tl.arange(0, SIDE)
        column = tl.arange(0, GROUPS * POWER)
        index = group * (POWER * ORDER) + column[None, :] * ORDER + lane[:, None]
        inside = (lane[:, None] < ORDER) & (group + column[None, :] // POWER < count)
        value = tl.load(x + index, mask=inside, other=0.0)
        square = (lane[:, None] < ORDER) & (lane[None, :] < ORDER)
        turned = tl.load(core + lane[None, :] * ORDER + lane[:, None], mask=square, other=0.0)
        if UPCAST:  # the interpreter's dot takes bfloat16 for integers; its products fit float32
            value = value.to(tl.float32)
        # Signs are exact in every dtype, so half precision takes the tensor cores without rounding.
        value = tl.dot(turned.to(value.dtype), value, input_precision="ieee")
        value = tl.reshape(value, (SIDE * GROUPS, POWER))
        value = tl.reshape(_butterflies(value, SIDE * GROUPS, POWER, STAGES), (SIDE, GROUPS * POWER))
        tl.store(y + index, (value * scale).to(y.dtype.element_ty), mask=inside)
