"""Cutting a planned GGUF into parts, with the names and keys of llama.cpp's gguf-split."""

from __future__ import annotations

import dataclasses

from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import i32, u16
from optrot_edge.exporters.gguf_plan import Plan, PlannedTensor
from optrot_edge.models.gguf_parts import MAX_PARTS

SPLIT_KEYS = 256  # bytes of the three keys, the header and its padding, at most


def split_plan(plan: Plan, limit: int, metadata: int) -> list[Plan]:
    """The plan of every part, none of whose files exceeds `limit` bytes; `[plan]` when one file is enough.

    `metadata` are the bytes of all keys. They lie in the first part, which holds no tensor where that leaves no room
    for one; llama.cpp takes that too. Raises InputError for a limit that the keys or a single tensor exceed.
    """
    if metadata + sum(map(_stored, plan.tensors)) <= limit:
        return [plan]
    if metadata + SPLIT_KEYS > limit:
        raise InputError(f"--split-max-size: the vocabulary and other keys take {metadata:,} bytes, which lie in one "
                         f"file; {limit:,} are too few")
    groups, room = [[]], limit - metadata - SPLIT_KEYS
    for tensor in plan.tensors:
        size = _stored(tensor)
        if size > limit - SPLIT_KEYS:
            raise InputError(f"--split-max-size: {tensor.name} alone takes {tensor.nbytes:,} bytes; {limit:,} are too "
                             "few for a file that holds it")
        if size > room:
            groups.append([])
            room = limit - SPLIT_KEYS
        groups[-1].append(tensor)
        room -= size
    if len(groups) > MAX_PARTS:
        raise InputError(f"--split-max-size {limit:,}: that makes {len(groups):,} parts; at most {MAX_PARTS:,} are "
                         "possible")
    return [dataclasses.replace(plan, tensors=group, entries=_keys(plan, index, len(groups)))
            for index, group in enumerate(groups)]


def _keys(plan: Plan, index: int, count: int) -> dict:
    """The keys of one part: the model's are in the first only."""
    split = {"split.no": u16(index), "split.count": u16(count), "split.tensors.count": i32(len(plan.tensors))}
    return (plan.entries if index == 0 else {}) | split


def _stored(tensor: PlannedTensor) -> int:
    """Bytes of a tensor in the file, with its entry in the tensor list and padding."""
    entry = 24 + len(tensor.name.encode()) + 8 * len(tensor.shape)
    return entry + -(-tensor.nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
