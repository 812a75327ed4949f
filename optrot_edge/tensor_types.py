"""Which type every matrix gets: one for all, a mix of llama.cpp's by name, or overrides by pattern. Needs no torch.

The mixes are those of llama-quantize's file types with an imatrix (`llama_tensor_get_type_impl` in llama.cpp's
`src/llama-quant.cpp`), for dense models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from optrot_edge.errors import InputError
from optrot_edge.gridspec import FLOAT_TYPES, SUPER_BLOCK, grid_spec
from optrot_edge.models.family import HEAD_MIX

Rule = Callable[[int, int], str | None]  # layer, layers → type, or None for the base's


@dataclass(frozen=True)
class Preset:
    """A mix: `base` for every matrix that no rule of `linears` (by canonical name) gives another type."""

    base: str
    linears: dict[str, Rule] = field(default_factory=dict)
    head: str = "q6_k"


def _more_bits(kind: str) -> Rule:
    """The first and the last eighth of the layers, and every third between them."""
    return lambda i, n: kind if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else None


def _first(count: Callable[[int], int], kind: str, rest: str | None = None) -> Rule:
    return lambda i, n: kind if i < count(n) else rest


def _always(kind: str) -> Rule:
    return lambda *_: kind


PRESETS = {
    "q3_k_s": Preset("q3_k"),
    "q3_k_m": Preset("q3_k", {"v_proj": _first(lambda n: 2, "q5_k", "q4_k"), "o_proj": _always("q4_k"),
                              "down_proj": _first(lambda n: n // 16, "q5_k", "q4_k")}),
    "q3_k_l": Preset("q3_k", {name: _always("q5_k") for name in ("v_proj", "o_proj", "down_proj")}),
    "q4_k_s": Preset("q4_k", {"v_proj": _first(lambda n: 4, "q5_k"), "down_proj": _first(lambda n: n // 8, "q5_k")}),
    "q4_k_m": Preset("q4_k", {"v_proj": _more_bits("q6_k"), "down_proj": _more_bits("q6_k")}),
    "q5_k_s": Preset("q5_k"),
    "q5_k_m": Preset("q5_k", {"v_proj": _more_bits("q6_k"), "down_proj": _more_bits("q6_k")}),
}


def base_grid(kind: str) -> str:
    """The grid or float type of most matrices under the type or preset `kind`; InputError for an unknown one."""
    if kind in PRESETS:
        return PRESETS[kind].base
    if kind not in FLOAT_TYPES:
        try:
            grid_spec(kind)
        except InputError as error:
            raise InputError(f"{error}, or a mix: {', '.join(PRESETS)}") from None
    return kind


def head_grid(kind: str, hidden_size: int, format: str = "gguf") -> str:
    """The type of the head where the body is `kind` and nothing else is asked for."""
    if kind.startswith("mlx-"):
        return kind  # mlx-lm treats it as the rest
    if format == "onnx":
        return re.sub(r"^int\d", "int8", kind)
    if kind in FLOAT_TYPES:
        return kind  # who wants a float file wants all of it so
    if kind not in PRESETS:
        return "q8_0"
    return "q8_0" if hidden_size % SUPER_BLOCK else PRESETS[kind].head


def all_shapes(family, config) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of every tensor of the model: the embedding, the layers, the rest."""
    shapes = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in family.layer_shapes(config).items()}
    return shapes | family.outer_shapes(config)


def part_of(name: str, config) -> str:
    """"body", "embedding" or "head" of a matrix; a tied one is the head, and so is what it is tied through."""
    if name in ("lm_head.weight", HEAD_MIX) or (name == "embed_tokens.weight" and config.tie_word_embeddings):
        return "head"
    return "embedding" if name == "embed_tokens.weight" else "body"


def tensor_types(family, config, recipe, chosen: dict[str, str] | None = None) -> dict[str, str | None]:
    """The type asked for of every matrix, by canonical name (`layers.3.q_proj.weight`).

    `chosen` has what a target size allotted; without it such types are None. Rows that a type does not fit get
    `gridspec.fitting_type`'s later. The matrix that a head is tied through stays float, whatever the recipe says.
    Raises InputError for an override that matches nothing.
    """
    overrides, used, types = parse_overrides(recipe.tensor_type), set(), {}
    for name, shape in all_shapes(family, config).items():
        if len(shape) == 1:
            continue
        if name == HEAD_MIX:  # f16 loses a thousandth of what an 8-bit head does
            types[name] = "f32" if types["embed_tokens.weight"] == "f32" else "f16"
            continue
        types[name] = (chosen or {}).get(name) or _by_recipe(name, config, recipe, family)
        gguf_name = family.gguf_name(name)
        for pattern, kind in overrides.items():  # the first that matches, as llama-quantize has it
            if pattern.search(name) or pattern.search(gguf_name):
                types[name] = kind
                used.add(pattern)
                break
    for pattern in overrides.keys() - used:
        raise InputError(f"--tensor-type {pattern.pattern}={overrides[pattern]}: no matrix of this model is left that "
                         "it matches; names are like ffn_down, blk.3.attn_v.weight, layers.3.v_proj.weight or output")
    return types


def _by_recipe(name: str, config, recipe, family) -> str | None:
    """What --type, --embedding-type and --head-type say; None where only a target size decides."""
    part = part_of(name, config)
    given = {"head": recipe.head_type, "embedding": recipe.embedding_type}.get(part)
    if given or recipe.has_target:
        return given
    if part == "head":
        return head_grid(recipe.type, config.hidden_size, recipe.format)
    if part == "embedding":
        return recipe.grid
    if recipe.type not in PRESETS:
        return recipe.grid
    preset, (_, layer, linear, _) = PRESETS[recipe.type], name.split(".")
    layers, groups = config.num_hidden_layers, config.query_groups
    rule = preset.linears.get(linear)
    kind = (rule and rule(int(layer), layers)) or preset.base
    if linear == "v_proj" and kind in ("q3_k", "q4_k") and layers == 80 and (groups > 1 or family.gguf_arch != "llama"):
        return "q5_k"  # llama.cpp's rule for 70B models, which it knows by their layers
    return kind


def parse_overrides(overrides) -> dict[re.Pattern, str]:
    """`PATTERN=TYPE` entries: regular expressions, and the types of what they match. InputError for a bad one."""
    found: dict[re.Pattern, str] = {}
    for entry in overrides:
        pattern, equals, kind = entry.rpartition("=")
        kind = kind.strip().lower()
        if not equals or not pattern:
            raise InputError(f"--tensor-type {entry}: PATTERN=TYPE is needed, such as ffn_down=q6_k")
        if kind not in FLOAT_TYPES:
            grid_spec(kind)
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(f"--tensor-type {entry}: {pattern!r} is no regular expression: {error}") from None
        if compiled in found:
            raise InputError(f"--tensor-type {entry}: {pattern!r} is given twice; leave one out")
        found[compiled] = kind
    return found


def most_frequent(types: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> str:
    """The type that most weights of the decoder's matrices have."""
    sizes: dict[str, int] = {}
    for name, kind in types.items():
        if name.startswith("layers."):
            sizes[kind] = sizes.get(kind, 0) + prod(shapes[name])
    return max(sizes, key=sizes.get)
