"""Types that fit a size: which matrix gets how many bits, by measured KL per byte. Needs no torch.

Every matrix has a cost (KL in nats per token, `optrot_edge.quantize.costs`) for every type that fits its rows, and
costs add up. Steps along the lower convex hull of a matrix's (bytes, cost) points are taken in order of KL saved per
byte until none fits (the greedy solution of the multiple-choice knapsack problem; Sinha & Zoltners 1979); what is left
is spent on the best exchanges that still fit.
"""

from __future__ import annotations

from math import prod

from optrot_edge.errors import InputError
from optrot_edge.formats import bits_of
from optrot_edge.gridspec import fitting_type
from optrot_edge.tensor_types import all_shapes, tensor_types


def target_bytes(family, config, recipe) -> float | None:
    """Bytes that all tensors may take; None without a target. `config` is the unrotated model's: an R1 that unties the
    head does not earn more bytes."""
    if recipe.target_size is not None:
        return float(recipe.target_size)
    if recipe.target_bpw is not None:
        return recipe.target_bpw * sum(map(prod, all_shapes(family, config).values())) / 8
    return None


def allot(family, config, recipe, costs: dict[str, dict[str, float]], budget: float) -> tuple[dict[str, str], float]:
    """Types of every matrix by canonical name, whose bytes with all other tensors are at most `budget`, and the KL
    expected of them. `config` is the (rotated) model's; `costs` as `optrot_edge.quantize.costs.measure_costs` has them.

    What --tensor-type, --embedding-type and --head-type say stays. `budget` is what `check_target` returned.
    """
    shapes = all_shapes(family, config)
    asked = tensor_types(family, config, recipe)
    options = {name: _options(name, shapes[name], kind, costs, config, recipe) for name, kind in asked.items()}
    spare = budget - _other_bytes(config, recipe, shapes, asked)
    picked = {name: min(points) for name, points in options.items()}  # by bytes, then by cost
    spare -= sum(point[0] for point in picked.values())
    spare = _climb(picked, {name: _hull(points) for name, points in options.items()}, spare)
    _exchange(picked, options, spare)
    return {name: kind for name, (_, _, kind) in picked.items()}, sum(cost for _, cost, _ in picked.values())


def check_target(source, config, recipe) -> float:
    """The bytes that all tensors of `source` may take, `config` its (rotated) model's; InputError when the smallest
    types take more."""
    budget, shapes = target_bytes(source.family, source.config, recipe), all_shapes(source.family, config)
    asked = tensor_types(source.family, config, recipe)
    least = _other_bytes(config, recipe, shapes, asked) + sum(
        min(_options(name, shapes[name], kind, {}, config, recipe))[0] for name, kind in asked.items())
    if least > budget:
        raise InputError(f"the smallest types take {least:,.0f} bytes and {budget:,.0f} are asked for; "
                         "raise --target-size or --target-bpw")
    return budget


def _other_bytes(config, recipe, shapes, asked) -> float:
    """Bytes of the tensors whose types nobody chooses: norms, biases and, in a GGUF, RoPE's factors."""
    count = sum(prod(shape) for name, shape in shapes.items() if name not in asked)
    factors = config.rope_freq_factors() if recipe.format == "gguf" else None
    return (count + len(factors or [])) * bits_of("f32", recipe.dtype) / 8


def _options(name: str, shape, kind: str | None, costs, config, recipe) -> list[tuple[float, float, str]]:
    """(bytes, cost, type) of what a tensor may be: one point where its type is given."""
    kinds = recipe.candidates(shape[-1]) if kind is None else [fitting_type(kind, shape[-1])]
    if not kinds:
        raise InputError(f"{name}: rows of {shape[-1]} weights fit no type of this format; give it f16 with "
                         "--tensor-type")
    given = kind is not None
    return [(prod(shape) * bits_of(kind, recipe.dtype) / 8, _cost(costs, name, kind, config, given), kind)
            for kind in kinds]


def _cost(costs, name: str, kind: str, config, given: bool) -> float:
    """KL of `name` as `kind`; a tied matrix errs as embedding and as head. Of matrices that were not measured, and of a
    `given` type that was not, 0; KeyError for another."""
    both = name == "embed_tokens.weight" and config.tie_word_embeddings
    parts = [costs[part] for part in ([name, "lm_head.weight"] if both else [name]) if part in costs]
    return sum(part.get(kind, 0.0) if given else part[kind] for part in parts)


def _hull(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The lower convex hull, from the smallest upwards: each step saves less KL per byte than the one before it."""
    hull: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue  # larger and no better
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _rate(small, large) -> float:
    """Cost saved per byte."""
    return (small[1] - large[1]) / (large[0] - small[0])


def _climb(picked: dict, hulls: dict[str, list], spare: float) -> float:
    """Take hull steps of all matrices by falling rate while they fit; returns the bytes left."""
    steps = [(_rate(a, b), name, b) for name, hull in hulls.items() for a, b in zip(hull, hull[1:], strict=False)]
    stuck = set()
    for _, name, point in sorted(steps, key=lambda step: (-step[0], step[1])):
        more = point[0] - picked[name][0]
        if name in stuck or more > spare:
            stuck.add(name)
            continue
        picked[name] = point
        spare -= more
    return spare


def _exchange(picked: dict, options: dict[str, list], spare: float) -> None:
    """Spend what is left: the change of one matrix's type that saves most and fits, again and again."""
    while True:
        moves = [(picked[name][1] - point[1], point[0] - picked[name][0], name, point)
                 for name, points in options.items() for point in points
                 if point[0] - picked[name][0] <= spare and point[1] < picked[name][1]]
        if not moves:
            return
        _, more, name, point = max(moves)
        picked[name] = point
        spare -= more
