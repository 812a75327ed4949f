"""Work shared out over processes (torchrun), and the collectives that join it.

Nearly everything is summed: what belongs to one process is zero elsewhere, so a sum gathers it exactly.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from optrot_edge.errors import InputError
from optrot_edge.memory import physical_memory
from optrot_edge.processes import process_count

TIMEOUT = timedelta(hours=1)  # layers are shared out evenly, but reading them may stall


def local_device(device: str) -> str:
    """"cuda" as this process's own GPU (LOCAL_RANK); other devices as they are.

    Raises InputError, in every process alike, when the machine has fewer GPUs than processes.
    """
    if device != "cuda" or process_count() == 1:
        return device
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > torch.cuda.device_count():
        raise InputError(f"{here} processes were started but the machine has {torch.cuda.device_count()} GPUs; "
                         "lower --nproc-per-node, or pass --device cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def spare_memory(device: str) -> int:
    """Bytes of rows to keep: half of a GPU's free memory, a quarter of the machine's shared by its processes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0] // 2
    return (physical_memory() or 2**33) // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class World:
    """The processes that learn or quantise together; alone, `sum` is the identity."""

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)
        if process_count() > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(_leave)
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)

    def mine(self, count: int) -> range:
        """Which of `count` layers this process owns: every size-th, so that unequal layers even out."""
        return range(self.rank, count, self.size)

    def share(self, count: int, step: int = 1) -> slice:
        """Which of `count` windows or rows, in pieces of `step`, are this process's: a run, perhaps an empty one."""
        pieces = -(-count // step)
        first, last = (pieces * rank // self.size * step for rank in (self.rank, self.rank + 1))
        return slice(min(first, count), min(last, count))

    def gather(self, part: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """All `rows` of a tensor of which every process has its `share` [share, ...]; None stays None."""
        if self.size == 1 or part is None:
            return part
        whole = part.new_zeros(rows, *part.shape[1:])
        whole[self.share(rows)] = part
        return self.sum(whole)

    def maximum(self, value: float) -> float:
        """The largest `value` of all processes; infinity when one is NaN."""
        if self.size == 1:
            return value
        there = torch.tensor(math.inf if math.isnan(value) else value, device=self.device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        return float(there)

    @contextmanager
    def same_errors(self) -> Iterator[None]:
        """An InputError inside, in whichever process, is raised in all: only rank 0 prints, and none waits in vain.

        Nothing inside may be collective.
        """
        caught = None
        try:
            yield
        except InputError as error:
            caught = error
        if self.size > 1:
            errors: list = [None] * self.size
            dist.all_gather_object(errors, caught)
            caught = next((error for error in errors if error is not None), None)
        if caught is not None:
            raise caught

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all processes; returned on the device it came from."""
        if self.size == 1:
            return tensor
        there = tensor.to(self.device).clone()
        dist.all_reduce(there)
        return there.to(tensor.device)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor` in every process."""
        return self.sum(tensor if self.rank == 0 else torch.zeros_like(tensor))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
