"""What an export will do, before it does it: bytes, bits per weight, memory and time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

from optrot_edge.budget import check_target
from optrot_edge.checkpoint import FLOAT_TYPES, QuantizedCheckpoint, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.formats import bits_of
from optrot_edge.gridspec import SUPER_BLOCK, fitting_type
from optrot_edge.memory import OVERHEAD, must_spill, stream_bytes, working_set
from optrot_edge.rotations.effort import BASELINE_EFFORTS
from optrot_edge.tensor_types import all_shapes, part_of, tensor_types

OPEN = "all tensors"  # the part whose size is given and whose types are not
LIGHT_OVERHEAD = 60 * 2**20  # and without
EXPORT_RATE = 60e6  # bytes packed, written and read back per second on one laptop core


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
    from optrot_edge.rotations.fuse import packaged

    original, config = source.config, packaged(source, rotation, recipe.format).config
    parts, types = _parts(source, config, recipe), _types(source.family, config, recipe)
    weights = sum(map(prod, all_shapes(source.family, config).values()))
    peak, flops = _effort(config, recipe, rotation.applied)
    if recipe.rotation == "optrot+" or recipe.has_target:
        flops += _statistics_flops(config, recipe)
    distilling, held = _end_loss_effort(config, recipe)
    peak, flops = max(peak, held), flops + distilling
    return {"family": config.family, "name": config.name, "layers": config.num_hidden_layers,
            "rotation": recipe.rotation, "rotated": rotation.applied,
            "unties_head": original.tie_word_embeddings and not config.tie_word_embeddings,
            "types": {"embedding": types.get("head"), **types}, "notes": check_widths(source, recipe, config),
            "bytes": round(sum(parts.values())), "bytes_by_part": {k: round(v) for k, v in parts.items()},
            "bits_per_weight": 8 * sum(parts.values()) / weights, "peak_memory_bytes": peak,
            "seconds": round(flops / gemm_rate() + 5)}


def plan_choice(source, recipe, arms: list, start_of: Callable) -> dict:
    """The plan of `--rotation auto`, which quantises and judges all `arms` (as `optrot_edge.auto.candidates` has
    them) that are not ruled out; `start_of(source, recipe)` is an arm's rotation before learning.

    Sizes, `rotated` and `unties_head` are those of the largest arm; "auto" says so.
    """
    from optrot_edge.auto import held_out_windows

    tried = [arm for arm in arms if not arm.skipped]
    recipes = {arm.name: dataclasses.replace(recipe, rotation=arm.rotation, rotate=arm.rotate) for arm in tried}
    starts = {arm.name: start_of(source, recipes[arm.name]) for arm in tried}
    largest = max(reversed(tried), key=lambda arm: arm.bits_per_weight)  # of equals the one that changes most
    plan = make_plan(source, recipes[largest.name], starts[largest.name])
    efforts = [_effort(source.config, recipes[name], starts[name].applied) for name in starts]
    judging = 4 * held_out_windows(recipe) * recipe.seqlen * (_body(source.config) + _matrix(source.config))
    flops = sum(flops + judging for _, flops in efforts)
    if recipe.has_target or any(arm.rotation == "optrot+" for arm in tried):
        flops += _statistics_flops(source.config, recipe)
    distilling, held = _end_loss_effort(source.config, recipe)  # of the best arm alone
    said = f"measures {', '.join(arm.name for arm in tried)}; sizes and rotations here are those of {largest.name}"
    said += "".join(f"; {arm.name} not tried: {arm.skipped}" for arm in arms if arm.skipped)
    return plan | {"rotation": "auto", "auto": said, "arms": [arm.name for arm in tried],
                   "peak_memory_bytes": max(held, *(peak for peak, _ in efforts)),
                   "seconds": round((flops + distilling) / gemm_rate() + 5)}


def stored_bytes(source, rotation, recipe) -> float:
    """Bytes of all tensors as a package stores them, for an open model, a Rotation (learned or not), a Recipe; with a
    target size, that."""
    from optrot_edge.rotations.fuse import packaged

    return sum(_parts(source, packaged(source, rotation, recipe.format).config, recipe).values())


def _parts(source, config, recipe) -> dict[str, float]:
    """Bytes by part; with a target size, the target."""
    if recipe.has_target:
        return {OPEN: check_target(source, config, recipe)}
    parts = {"body": 0.0, "embedding": 0.0, "head": 0.0, "norms and biases": 0.0}
    for part, kind, shape in _tensors(source.family, config, recipe):
        parts[part] += prod(shape) * bits_of(kind, recipe.dtype) / 8
    if recipe.format == "gguf":
        parts["norms and biases"] += 4 * len(config.rope_freq_factors() or [])
    return parts


def _asked(family, config, recipe, chosen=None):
    """(name, part, type asked for, shape) of every tensor, except those whose types a target size has yet to decide."""
    types = tensor_types(family, config, recipe, chosen)
    for name, shape in all_shapes(family, config).items():
        if name not in types:
            yield name, "norms and biases", "f32", shape
        elif types[name]:
            yield name, part_of(name, config), types[name], shape


def _tensors(family, config, recipe, chosen=None):
    """(part, type, shape) of every tensor; InputError for a type that does not fit its rows."""
    for name, part, kind, shape in _asked(family, config, recipe, chosen):
        kind = fitting_type(kind, shape[-1])
        if kind not in FLOAT_TYPES and shape[-1] % grid_spec(kind).block_size:
            raise InputError(f"{name}: rows of {shape[-1]} weights do not divide into {kind}'s groups of "
                             f"{grid_spec(kind).block_size}; choose another type")
        yield part, kind, shape


def check_widths(source, recipe, config=None, chosen=None) -> list[str]:
    """Remarks on the types that tensors get instead of the one asked for, because super-blocks of 256 do not fill
    their rows, or (given `config`, the rotated model's) because the embedding is the head's own matrix. InputError if
    a type of the Recipe does not fit the rows of the open model (`config` when rotated)."""
    tied, config, other = config is not None and config.tie_word_embeddings, config or source.config, {}
    for _ in _tensors(source.family, config, recipe, chosen):
        pass
    asked = {name: (kind, shape) for name, _, kind, shape in _asked(source.family, config, recipe, chosen)}
    for name, (kind, shape) in asked.items():
        if fitting_type(kind, shape[-1]) != kind:
            other.setdefault((kind, shape[-1]), {})[name.removesuffix(".weight").rpartition(".")[2]] = None
    notes = [f"rows of {width} weights do not fill {kind}'s super-blocks of {SUPER_BLOCK} and are stored as "
             f"{fitting_type(kind, width)}, as llama-quantize does: {', '.join(names)}"
             for (kind, width), names in other.items()]
    got, _ = asked.get("embed_tokens.weight", (None, None))
    if tied and recipe.embedding_type not in (None, got):
        notes.append(f"--embedding-type {recipe.embedding_type} is not used: the embedding is the head's own matrix, "
                     f"{got or 'of the type chosen'} (--head-type)")
    return notes


def _types(family, config, recipe) -> dict[str, str]:
    """The types of every part's matrices, the most frequent first."""
    if recipe.has_target:
        return {OPEN: "by measured KL per byte"}
    found: dict[str, dict[str, int]] = {}
    for part, kind, shape in _tensors(family, config, recipe):
        sizes = found.setdefault(part, {})
        sizes[kind] = sizes.get(kind, 0) + prod(shape)
    return _most_first(found)


def _most_first(found: dict[str, dict[str, int]]) -> dict[str, str]:
    return {part: ", ".join(sorted(sizes, key=sizes.get, reverse=True)) for part, sizes in found.items()}


def _body(config) -> int:
    """Weights of the decoder's matrices."""
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * config.hidden_size * (2 * q_rows + 2 * kv_rows + 3 * config.intermediate_size)


def _matrix(config) -> int:
    """Weights of the embedding, or of the head."""
    return config.vocab_size * config.hidden_size


def _observing_flops(config, tokens: int) -> int:
    """One pass over `tokens` that also sums the products of every linear's inputs."""
    squares = 2 * config.hidden_size**2 + (config.num_attention_heads * config.head_dim)**2
    return 2 * tokens * (_body(config) + config.num_hidden_layers * (squares + config.intermediate_size**2))


def _effort(config, recipe, rotated: list[str]) -> tuple[int, int]:
    """Estimated peak memory in bytes, and floating-point operations."""
    hidden, ff = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    body, matrix = _body(config), _matrix(config)
    tokens = recipe.nsamples * recipe.seqlen if recipe.calibration != "none" else 0
    widest = max(hidden, q_rows, ff)
    peak = sum(working_set(config, recipe).values())
    peak += 0 if must_spill(config, recipe) else stream_bytes(config, recipe)
    flops = _observing_flops(config, tokens)
    if recipe.quantizer == "gptq":
        flops += (4 + 6 * recipe.refits) * body * widest  # GPTQ in float64, the systems of the refits besides
    if recipe.asymmetric != "none":  # another stream, its products with the first, and five more sums like a Hessian
        flops += 2 * _observing_flops(config, tokens)
    learning = {"optrot": _learning_effort, "optrot+": _plus_effort, **BASELINE_EFFORTS}.get(recipe.rotation)
    if learning:
        more_flops, more_bytes = learning(config, recipe, body)
        flops, peak = flops + more_flops, peak + more_bytes
    if rotated:
        flops += 4 * (body + 2 * matrix) * hidden
    return round(peak), round(flops)


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


def _plus_effort(config, recipe, body: int) -> tuple[int, int]:
    """The same of learning OptRot+, without the statistics it learns from; float64 counts fourfold."""
    from optrot_edge.rotations.optrot_plus import CACHE_BYTES, OptRotPlusOptions

    hidden, ff, q_rows = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    rows = OptRotPlusOptions().rows + config.num_key_value_heads * config.head_dim
    step = 24 * hidden**3 + 12 * q_rows**3  # factors of the inputs' covariances in float64, and their gradients
    if "r1" in recipe.which:
        step += 16 * hidden**3 + 6 * hidden**2 * (q_rows + 3 * rows)
    layers = config.num_hidden_layers
    return layers * ((recipe.plus_steps + 2) * step + ff**3), min(8 * body, CACHE_BYTES) + 16 * hidden**2 * layers


def _end_loss_effort(config, recipe) -> tuple[int, int]:
    """Floating-point operations and peak memory of `--guidance`, two passes forward and one backward, and `--distill`:
    the float model once, and every epoch the same, to weights too, and another product with a head."""
    from optrot_edge.quantize.distill import DistillOptions

    body, matrix, tokens = _body(config), _matrix(config), recipe.nsamples * recipe.seqlen
    flops = tokens * (6 * body + 4 * matrix) if recipe.guidance != "none" else 0
    if not recipe.distill:
        return flops, 0
    flops += tokens * (2 * body + recipe.distill * (8 * body + 6 * matrix))
    batch = DistillOptions().batch_size * recipe.seqlen
    held = tokens * config.hidden_size + batch * (config.num_hidden_layers * config.hidden_size
                                                  + 12 * config.intermediate_size)
    moves = 2 * 3 * body // 32  # scales and mins, and Adam's two moments
    return flops, OVERHEAD + 4 * (3 * matrix + held + moves + 8 * body // config.num_hidden_layers)


def _statistics_flops(config, recipe) -> int:
    """Operations of collecting what OptRot+ learns from: covariances, and sensitivities to GPTQ's errors (fitted)."""
    from optrot_edge.inputs import SENSITIVITY_TOKENS

    body, widest = _body(config), max(config.hidden_size, config.intermediate_size)
    return (_observing_flops(config, recipe.nsamples * recipe.seqlen) + 16 * body * widest
            + 16 * SENSITIVITY_TOKENS * (body + _matrix(config)))


def plan_checkpoint(path: str | Path, format: str, options) -> dict:
    """The same plan for packaging an existing checkpoint (`options` are packages.PackageOptions); InputError for what
    the exporter refuses."""
    checkpoint = QuantizedCheckpoint(path)
    rows, notes = _package_tensors(checkpoint, format, options)
    types: dict[str, dict[str, int]] = {}
    parts: dict[str, float] = {}
    for source, kind, shape, nbytes in rows:
        part = {"embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(source, "body")
        part = part if len(shape) == 2 else "norms and biases"
        parts[part] = parts.get(part, 0) + nbytes
        if len(shape) == 2:
            sizes = types.setdefault(part, {})
            sizes[kind] = sizes.get(kind, 0) + prod(shape)
    model, total = checkpoint.manifest["model"], sum(parts.values())
    largest = max(prod(shape) for _, _, shape, _ in rows)
    return {"family": model["family"], "name": model["name"], "layers": model["num_hidden_layers"],
            "rotated": (checkpoint.manifest.get("rotation") or {}).get("applied", []), "unties_head": False,
            "types": _most_first(types), "notes": notes, "bytes": total, "bytes_by_part": parts,
            "bits_per_weight": 8 * total / sum(prod(shape) for source, _, shape, _ in rows if source),
            "peak_memory_bytes": LIGHT_OVERHEAD + 12 * largest, "seconds": round(total / EXPORT_RATE + 1)}


def _package_tensors(checkpoint: QuantizedCheckpoint, format: str, options) -> tuple[list[tuple], list[str]]:
    """(name in the checkpoint, type, shape, bytes) of every tensor of the package, and remarks."""
    if format != "gguf":
        from optrot_edge.packages import PACKAGES

        plan = PACKAGES[format].plan(checkpoint, options)
        return [(tensor.source, tensor.spec.name if tensor.spec else plan.dtype, tensor.shape, plan.size_of(tensor))
                for tensor in plan.tensors], plan.notes
    from optrot_edge.exporters.gguf import metadata_bytes
    from optrot_edge.exporters.gguf_plan import plan_gguf
    from optrot_edge.exporters.gguf_split import split_plan
    from optrot_edge.packages import split_size

    plan = plan_gguf(checkpoint, vocab_from=options.vocab_from)
    if options.split_max_size is not None:
        split_plan(plan, split_size(options.split_max_size), metadata_bytes(dataclasses.replace(plan, tensors=[])))
    return [(tensor.source, tensor.type.name.lower(), tensor.shape, tensor.nbytes)
            for tensor in plan.tensors], plan.notes
