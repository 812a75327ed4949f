"""What an export will do, before it does it: bytes, bits per weight, memory and time."""

from __future__ import annotations

import time
from math import prod
from pathlib import Path

from optrot_edge.checkpoint import FLOAT_TYPES, QuantizedCheckpoint, grid_spec
from optrot_edge.errors import InputError

BITS = {"f32": 32.0, "f16": 16.0}
OVERHEAD = 400 * 2**20  # the interpreter with torch loaded
LIGHT_OVERHEAD = 60 * 2**20  # and without
EXPORT_RATE = 60e6  # bytes packed, written and read back per second on one laptop core


def bits_of(kind: str) -> float:
    """Stored bits per weight of a grid or float type."""
    return BITS[kind] if kind in FLOAT_TYPES else grid_spec(kind).bits_per_weight


def gemm_rate() -> float:
    """float32 multiply-adds per second here, ×2 (flop/s): the best of three 1024³ products."""
    import torch

    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def make_plan(source, recipe, rotation) -> dict:
    """The plan for an open model, a Recipe and a Rotation (R1 and R2 need not be learned yet).

    `bytes` are those of all tensors in the package (metadata adds the vocabulary's strings);
    `peak_memory_bytes` and `seconds` are estimates: the latter from a GEMM timed here and the operation
    counts of the solver, GPTQ and the calibration passes (about right for SmolLM2-135M on two idle cores).
    Raises InputError for a type that does not fit the model's rows.
    """
    from optrot_edge.rotations.fuse import RotatedModel

    original, config = source.config, RotatedModel(source, rotation).config
    parts, weights = _sizes(source.family, config, recipe)
    peak, seconds = _effort(config, recipe, rotation.applied)
    return {"family": config.family, "name": config.name, "layers": config.num_hidden_layers,
            "rotated": rotation.applied,
            "unties_head": original.tie_word_embeddings and not config.tie_word_embeddings,
            "types": {"body": recipe.type, "head": recipe.head_type,
                      "embedding": recipe.head_type if config.tie_word_embeddings else recipe.embedding_type},
            "bytes": round(sum(parts.values())), "bytes_by_part": {k: round(v) for k, v in parts.items()},
            "bits_per_weight": 8 * sum(parts.values()) / weights, "peak_memory_bytes": peak, "seconds": seconds}


def stored_bytes(source, rotation, recipe) -> float:
    """Bytes of all tensors as a package stores them, for an open model, a Rotation (learned or not), a Recipe."""
    from optrot_edge.rotations.fuse import RotatedModel

    return sum(_sizes(source.family, RotatedModel(source, rotation).config, recipe)[0].values())


def _sizes(family, config, recipe) -> tuple[dict[str, float], int]:
    """Bytes by part, and the number of weights."""
    parts, weights = {"body": 0.0, "embedding": 0.0, "head": 0.0, "norms and biases": 0.0}, 0
    for part, kind, shape, count in _tensors(family, config, recipe):
        parts[part] += count * prod(shape) * bits_of(kind) / 8
        weights += count * prod(shape)
    parts["norms and biases"] += 4 * len(config.rope_freq_factors() or [])
    return parts, weights


def _tensors(family, config, recipe):
    """(part, type, shape, how many) of every tensor; InputError for a type that does not fit its rows."""
    shapes = [(name, shape, 1) for name, shape in family.outer_shapes(config).items()]
    shapes += [(name, shape, config.num_hidden_layers) for name, shape in family.layer_shapes(config).items()]
    for name, shape, count in shapes:
        part, kind = "body", recipe.type
        if len(shape) == 1:
            part, kind = "norms and biases", "f32"
        elif name == "lm_head.weight" or (name == "embed_tokens.weight" and config.tie_word_embeddings):
            part, kind = "head", recipe.head_type
        elif name == "embed_tokens.weight":
            part, kind = "embedding", recipe.embedding_type
        if kind not in FLOAT_TYPES and shape[-1] % grid_spec(kind).group_size:
            raise InputError(f"{name}: rows of {shape[-1]} weights do not divide into {kind}'s groups of "
                             f"{grid_spec(kind).group_size}; choose another type")
        yield part, kind, shape, count


def check_widths(source, recipe) -> None:
    """InputError if one of the Recipe's types does not fit the rows of the open model."""
    for _ in _tensors(source.family, source.config, recipe):
        pass


def _effort(config, recipe, rotated: list[str]) -> tuple[int, int]:
    """Estimated peak memory in bytes and time in seconds."""
    hidden, ff = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * q_rows + 2 * kv_rows + 3 * ff)
    body, matrix = layer * config.num_hidden_layers, config.vocab_size * hidden
    tokens = recipe.nsamples * recipe.seqlen if recipe.calibration != "none" else 0
    widest = max(hidden, q_rows, ff)
    peak = OVERHEAD + 4 * (3 * matrix + 8 * layer + 2 * tokens * hidden + 8 * recipe.seqlen * ff * 4
                           + 8 * widest * widest)
    flops = 2 * tokens * body + 2 * tokens * config.num_hidden_layers * (2 * hidden**2 + q_rows**2 + ff**2)
    if recipe.quantizer == "gptq":
        flops += 4 * body * widest  # float64
    if recipe.rotation == "optrot":
        more_flops, more_bytes = _learning_effort(config, recipe, body)
        flops, peak = flops + more_flops, peak + more_bytes
    if rotated:
        flops += 4 * (body + 2 * matrix) * hidden
    return round(peak), round(flops / gemm_rate() + 5)


def _learning_effort(config, recipe, body: int) -> tuple[int, int]:
    """Floating-point operations and bytes of learning R1 and R2; `body` counts the decoder's weights."""
    from optrot_edge.rotations.distributed import spare_memory
    from optrot_edge.rotations.learner import POOL

    hidden, options = config.hidden_size, recipe.optrot_options()
    rows = min(options.rows_per_step(hidden) or body, body // hidden)
    heads = config.num_attention_heads + config.num_key_value_heads
    values = config.num_hidden_layers * heads * config.head_dim  # rows of v and o, for R2
    flops = options.steps * (4 * rows * hidden**2 + 2 * values * hidden**2 + 40 * hidden**3) + 8 * body * hidden
    return flops, min(4 * body, POOL) + min(4 * body, spare_memory("cpu"))


def plan_checkpoint(path: str | Path, vocab_from: str | Path | None = None) -> dict:
    """The same plan for packaging an existing checkpoint; InputError for what the exporter refuses."""
    from optrot_edge.exporters.gguf_plan import plan_gguf

    checkpoint = QuantizedCheckpoint(path)
    plan, model = plan_gguf(checkpoint, vocab_from=vocab_from), checkpoint.manifest["model"]
    types: dict[str, str] = {}
    parts: dict[str, float] = {}
    for tensor in plan.tensors:
        part = {"embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(tensor.source, "body")
        part = part if len(tensor.shape) == 2 else "norms and biases"
        parts[part] = parts.get(part, 0) + tensor.nbytes
        if len(tensor.shape) == 2:
            types[part] = tensor.type.name.lower()
    largest = max(prod(tensor.shape) for tensor in plan.tensors)
    return {"family": model["family"], "name": model["name"], "layers": model["num_hidden_layers"],
            "rotated": (checkpoint.manifest.get("rotation") or {}).get("applied", []), "unties_head": False,
            "types": types, "bytes": plan.nbytes, "bytes_by_part": parts,
            "bits_per_weight": 8 * plan.nbytes / plan.weights,
            "peak_memory_bytes": LIGHT_OVERHEAD + 12 * largest, "seconds": round(plan.nbytes / EXPORT_RATE + 1)}
