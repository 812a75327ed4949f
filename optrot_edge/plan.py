"""What an export will do, before it does it: bytes, bits per weight, memory and time."""

from __future__ import annotations

import time

from optrot_edge.checkpoint import FLOAT_TYPES, grid_spec

BITS = {"f32": 32.0, "f16": 16.0}
OVERHEAD = 400 * 2**20  # the interpreter with torch loaded


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


def make_plan(source, recipe) -> dict:
    """The plan for an open model and a Recipe.

    `bytes` counts tensors (metadata adds the vocabulary's strings); `peak_memory_bytes` and `seconds`
    are estimates: the latter from a GEMM timed here and the operation counts of the solver, GPTQ and the
    calibration passes, doubled for everything that is no GEMM.
    """
    import torch

    config = source.config
    hidden, ff, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_rows, q_rows = config.num_key_value_heads * config.head_dim, heads * config.head_dim
    layer = hidden * (2 * q_rows + 2 * kv_rows + 3 * ff)
    body, matrix = layer * config.num_hidden_layers, config.vocab_size * hidden
    rotated = [] if recipe.rotation == "none" else sorted(recipe.which)
    unties = config.tie_word_embeddings and "r1" in rotated
    if unties:
        gain = source.final_norm(torch.float64)
        unties = bool((gain != gain[0]).any())
    untied = unties or not config.tie_word_embeddings
    parts = {"body": body * bits_of(recipe.type) / 8,
             "embedding": matrix * bits_of(recipe.embedding_type) / 8 if untied else 0.0,
             "head": matrix * bits_of(recipe.head_type) / 8,
             "norms": 4.0 * hidden * (2 * config.num_hidden_layers + 1)}
    weights = body + matrix * (2 if untied else 1)
    tokens = recipe.nsamples * recipe.seqlen if recipe.calibration != "none" else 0
    widest = max(hidden, q_rows, ff)
    peak = OVERHEAD + 4 * (3 * matrix + 8 * layer + 2 * tokens * hidden + 8 * recipe.seqlen * ff * 4
                           + 8 * widest * widest)
    flops = 2 * tokens * 2 * body + 2 * tokens * config.num_hidden_layers * (2 * hidden**2 + q_rows**2 + ff**2)
    if recipe.quantizer == "gptq":
        flops += 4 * body * widest  # float64
    if recipe.rotation == "optrot":
        flops += recipe.optrot_steps * 4 * recipe.optrot_rows * hidden**2 + 8 * body * hidden
        peak += min(2**29, 40 * recipe.optrot_rows * hidden)
    if rotated:
        flops += 4 * (body + 2 * matrix) * hidden
    return {"family": config.family, "name": config.name, "layers": config.num_hidden_layers, "rotated": rotated,
            "unties_head": unties, "types": {"body": recipe.type, "head": recipe.head_type,
                                             "embedding": recipe.embedding_type if untied else recipe.head_type},
            "bytes": round(sum(parts.values())), "bytes_by_part": {k: round(v) for k, v in parts.items()},
            "bits_per_weight": 8 * sum(parts.values()) / weights, "peak_memory_bytes": round(peak),
            "seconds": round(2 * flops / gemm_rate() + 5)}
