"""What every Triton kernel needs before its launch."""

from __future__ import annotations

from contextlib import nullcontext

import torch

try:
    import triton
except ImportError:  # macOS, Windows, a machine without the extra `learn`: the twins do the work
    triton = None

HALF_DTYPES = (torch.float16, torch.bfloat16)


def require_triton(x: torch.Tensor) -> None:
    """Raise ValueError unless a Triton kernel can take `x` here."""
    if triton is None:
        raise ValueError("triton is not installed; call the kernel's torch twin")
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"Triton kernels take CUDA tensors, not {x.device.type}; call the kernel's torch twin, "
                         "or set TRITON_INTERPRET=1 before Python starts")


def runs_triton(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether `x` goes to a kernel by default: on CUDA, of one of `dtypes`, with no gradient to record."""
    return (triton is not None and x.is_cuda and x.dtype in dtypes
            and not (torch.is_grad_enabled() and x.requires_grad))


def device_of(x: torch.Tensor):
    """Context in which Triton launches on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_out(x: torch.Tensor, out: torch.Tensor | None) -> None:
    """Raise ValueError unless `out` (None: fine) can hold a result of x's shape and dtype."""
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}: x's {x.dtype} {tuple(x.shape)} "
                         f"on {x.device} is needed")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out cannot record a gradient; detach the tensors or leave out away")
