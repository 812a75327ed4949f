"""How much memory a run takes, how much it may take, and what goes to the disk when that is not enough."""

from __future__ import annotations

import os
import re
from pathlib import Path

from optrot_edge.checkpoint import FLOAT_TYPES
from optrot_edge.errors import InputError
from optrot_edge.formats import bits_of

OVERHEAD = 480 * 2**20  # torch, the tokenizer and the text, measured
BATCH = 8  # calibration windows at a time
CHUNK = 8192  # rows of the embedding or the head at a time
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "800MB" or a plain number; InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise InputError(f"{text!r} is no size; give bytes, or a number with a unit, such as 8GiB or 800MB")
    return int(float(found[1]) * _UNITS[found[2]])


def physical_memory() -> int | None:
    """Bytes of this machine's memory, or of the control group's share; None where it cannot be told."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # none, or "max"
        return total


def stream_bytes(config, recipe) -> int:
    """Residual streams of the calibration tokens: one, and the float model's with asymmetric calibration."""
    tokens = recipe.nsamples * recipe.seqlen if recipe.calibration != "none" else 0
    return 4 * tokens * config.hidden_size * (1 if recipe.asymmetric == "none" else 2)


def working_set(config, recipe) -> dict[str, int]:
    """Bytes that quantising takes whatever is on the disk, by part; independent of the number of layers.

    A layer's weights are held as float64 and float32 while they are rotated, later as float32, codes and GPTQ's
    working copies. Of embedding and head, which are read by rows, codes are held; whoever learns from gradients or
    judges by KL needs the whole head in float32.
    """
    hidden, ff = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer, widest = hidden * (2 * q_rows + 2 * kv_rows + 3 * ff), max(hidden, q_rows, ff)
    tokens = recipe.nsamples * recipe.seqlen if recipe.calibration != "none" else 0
    stored = max(2 if kind not in FLOAT_TYPES else round(bits_of(kind)) // 4
                 for kind in (recipe.embedding_type or recipe.grid, recipe.head_type or "q8_0"))
    matrix = config.vocab_size * hidden * (stored + (12 if recipe.learns_with_data or recipe.has_target else 0))
    matrix += 4 * hidden * (16 * min(CHUNK, config.vocab_size) + 2 * min(config.vocab_size, tokens))
    moments = 68 if recipe.asymmetric == "none" else 112  # bytes per entry, measured: sums, factors and corrections
    return {"torch": OVERHEAD, "embedding and head": matrix,
            "a layer": layer * (32 if recipe.asymmetric == "none" else 36), "Hessians": moments * widest**2,
            "activations of a batch": 16 * BATCH * recipe.seqlen * ff}


def must_spill(config, recipe) -> bool:
    """Whether the streams go to the disk; InputError when not even the rest fits `recipe.max_memory`."""
    parts = working_set(config, recipe)
    needed = sum(parts.values())
    limit = physical_memory() if recipe.max_memory is None else parse_size(recipe.max_memory)
    if recipe.max_memory is not None and needed > limit:
        listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        raise InputError(f"--max-memory {recipe.max_memory} is too little for this model and recipe: about "
                         f"{_size(needed)} are needed ({listed}); raise it, or lower --seqlen or --nsamples")
    return limit is not None and needed + stream_bytes(config, recipe) > limit


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
