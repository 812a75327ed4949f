"""What a checkpoint becomes in GGUF: keys, tensor names, types and row orders, before any byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from optrot_edge.checkpoint import QuantizedCheckpoint, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.gguf_blocks import check_grid
from optrot_edge.exporters.gguf_entries import Entries, array, f32, string, u32
from optrot_edge.exporters.gguf_general import general_entries, method_entries
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family, get_family
from optrot_edge.models.gguf_r4 import BASE_KEY, BLOCK_KEY, FORMAT_VERSION, SUFFIX, VERSION_KEY
from optrot_edge.tensor_types import all_shapes

ROPE_FREQS = "rope_freqs.weight"
# "S": all matrices of one type, which is what the llama.cpp mixes of that name come nearest to.
_FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "MXFP4": "MXFP4_MOE"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file. `source` is its name in the checkpoint ("" for `rope_freqs.weight`);
    `heads` is the number of attention heads whose rows change order, or 0."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        block, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size

    def row_order(self) -> np.ndarray | None:
        """Hugging Face row that each row of the file holds, or None when the order stays.

        llama.cpp's `llama` rotates neighbours (2i, 2i + 1) of a head where Hugging Face rotates
        (i, i + head_dim / 2).
        """
        if not self.heads:
            return None
        rows = np.arange(self.shape[0])
        return rows.reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclass
class Plan:
    """Everything but the tensors' data. `arch` is general.architecture; `notes` are remarks for the user."""

    arch: str
    file_type: LlamaFileType
    entries: Entries
    tensors: list[PlannedTensor]
    rope_freqs: np.ndarray | None
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of the model's weights."""
        return sum(prod(t.shape) for t in self.tensors if t.source)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)


def plan_gguf(checkpoint: QuantizedCheckpoint, *, name: str | None = None,
              vocab_from: Path | None = None) -> Plan:
    """Plan the GGUF of `checkpoint`.

    With R4 stock llama.cpp refuses the file, see `optrot_edge.models.gguf_r4`.
    Raises InputError for what llama.cpp cannot run (R3, a head tied through a matrix, other grids, tensors
    its graph does not read) and for a checkpoint whose tensors contradict its model configuration.
    """
    family, config, shapes = expected_tensors(checkpoint)
    rotation = checkpoint.manifest.get("rotation") or {}
    _check_rotation(rotation, config)
    if config.head_mix:
        raise InputError("the checkpoint's head is tied to its embedding through a matrix, which stock llama.cpp does "
                         "not have: it was made for a package with its own model file; quantise again with --format "
                         "gguf")
    _check_graph(family, config, shapes)
    tensors = [_planned(checkpoint, family, config, source, shape) for source, shape in shapes.items()]
    factors = _rope_factors(family, config)
    if factors is not None:
        tensors.append(PlannedTensor(ROPE_FREQS, "", factors.shape, GGMLQuantizationType.F32))
    file_type = _file_type(tensors)
    notes = checkpoint.manifest.get("notes")
    plan = Plan(family.gguf_arch, file_type, {}, tensors, factors, list(notes) if isinstance(notes, list) else [])
    _plan_entries(plan, checkpoint.path / "tokenizer", name, config, vocab_from, rotation.get("r4_block"))
    plan.entries |= method_entries(checkpoint.manifest)
    return plan


def plan_of_model(config: ModelConfig, folder: Path, *, vocab_from: Path | None = None,
                  r4_block: int | None = None) -> Plan:
    """The plan of a model that is not quantised yet, all of it float32: keys and names are those of its package.

    `folder` is where its tokenizer was saved. Raises InputError for a vocabulary that GGUF cannot have.
    """
    family = get_family(config.family)
    factors = _rope_factors(family, config)
    tensors = [PlannedTensor(family.gguf_name(source), source, shape, GGMLQuantizationType.F32)
               for source, shape in all_shapes(family, config).items()]
    plan = Plan(family.gguf_arch, LlamaFileType.ALL_F32, {}, tensors, factors)
    _plan_entries(plan, folder, None, config, vocab_from, r4_block)
    return plan


def _plan_entries(plan: Plan, folder: Path, name: str | None, config: ModelConfig, vocab_from: Path | None,
                  r4_block: int | None) -> None:
    """Set the plan's keys, and with R4 its architecture."""
    base = plan.arch
    if r4_block:
        plan.arch = base + SUFFIX
        plan.notes.append(f"R4 runs online, so llama.cpp's own tools refuse the file as {plan.arch}; optrot-edge and "
                          "examples/llama_cpp run it")
    plan.entries = (general_entries(plan.arch, plan.file_type, plan.weights, folder, name, config.name)
                    | _model_entries(base, config, plan.notes)
                    | (_r4_entries(plan, base, r4_block) if r4_block else {})
                    | vocabulary(folder, config.vocab_size, vocab_from=vocab_from, special_ids=special_ids(config)))


def _r4_entries(plan: Plan, base: str, block: int) -> Entries:
    """What a runtime must do before `ffn_down`, in this project's keys and in `prism.hadamard` v1's."""
    names = [tensor.name for tensor in plan.tensors if tensor.source.endswith("down_proj.weight")]
    return {VERSION_KEY: u32(FORMAT_VERSION), BASE_KEY: string(base), BLOCK_KEY: u32(block),
            "prism.hadamard.version": u32(1), "prism.hadamard.block_size": u32(block),
            "prism.hadamard.transform": string("normalized-sylvester-walsh-hadamard"),
            "prism.hadamard.axis": string("input-last-dimension"), "prism.hadamard.sign_mode": string("identity"),
            "prism.hadamard.weight_names": array(names, GGUFValueType.STRING)}


def _check_rotation(rotation: dict, config: ModelConfig) -> None:
    applied, block = rotation.get("applied") or [], rotation.get("r4_block")
    if ("r4" in applied) != (block is not None):
        raise InputError(f"the checkpoint says {', '.join(applied) or 'no rotation'} and an R4 block of {block}; it is "
                         "damaged: quantise again")
    if block is not None and (not isinstance(block, int) or block < 2 or block & (block - 1)
                              or config.intermediate_size % block):
        raise InputError(f"the checkpoint's R4 block {block} is no power of two that divides "
                         f"{config.intermediate_size}; it is damaged: quantise again")
    if rotation.get("r3_block") or "r3" in applied:
        raise InputError("the checkpoint needs the online rotation R3; llama.cpp itself rotates K and V of a "
                         "quantised cache, so leave R3 out: quantise again with --rotate r1,r2")


def refuse_model(family: Family, config: ModelConfig) -> None:
    """InputError for what llama.cpp's graphs do not compute."""
    _check_graph(family, config, all_shapes(family, config))
    _rope_factors(family, config)


def _check_graph(family: Family, config: ModelConfig, shapes: dict) -> None:
    """InputError for tensors that llama.cpp's graph does not read."""
    for name in shapes:
        layer_key, _, kind = name.rpartition(".")
        if kind == "bias" and layer_key.rpartition(".")[2] not in family.gguf_biases:
            raise InputError(f"{name}: llama.cpp's {family.gguf_arch} has no such bias; "
                             "this model cannot become a GGUF")
    if family.gguf_arch == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise InputError("llama.cpp's qwen2 needs heads · head_dim = hidden_size; "
                         "this model cannot become a GGUF")


def _planned(checkpoint: QuantizedCheckpoint, family: Family, config: ModelConfig, source: str,
             shape: tuple[int, ...]) -> PlannedTensor:
    stored = checkpoint.manifest["tensors"][source]
    if "grid" in stored:
        spec = grid_spec(stored["grid"])
        check_grid(spec, source)
        if len(shape) != 2 or shape[1] % spec.block_size:
            raise InputError(f"{source} {list(shape)} cannot be {spec.name}: "
                             f"its rows must be a multiple of {spec.block_size}")
        kind = GGMLQuantizationType[spec.name.upper()]
    elif stored["dtype"] not in ("float32", "float16"):
        raise InputError(f"{source} is {stored['dtype']}; floats must be float32 or float16")
    elif len(shape) == 1:  # llama.cpp computes with norms and biases in float32 only
        kind = GGMLQuantizationType.F32
    elif source in checkpoint.bfloat16:
        kind = GGMLQuantizationType.BF16
    else:
        kind = GGMLQuantizationType.F16 if stored["dtype"] == "float16" else GGMLQuantizationType.F32
    heads = 0
    if family.gguf_permutes_qk:
        heads = {"q_proj": config.num_attention_heads,
                 "k_proj": config.num_key_value_heads}.get(source.split(".")[-2], 0)
    return PlannedTensor(family.gguf_name(source), source, shape, kind, heads)


def _rope_factors(family: Family, config: ModelConfig) -> np.ndarray | None:
    factors = config.rope_freq_factors()
    if factors is None:
        return None
    if family.gguf_arch != "llama":
        raise InputError(f"rope scaling {config.rope_scaling['rope_type']!r}: llama.cpp reads frequency "
                         f"factors for llama only, not for {family.gguf_arch}")
    return np.array(factors, np.float32)


def _file_type(tensors: list[PlannedTensor]) -> LlamaFileType:
    """The type that most weights of the decoder's linears have."""
    sizes: Counter = Counter()
    for tensor in tensors:
        if tensor.source.startswith("layers.") and len(tensor.shape) == 2:
            sizes[tensor.type] += prod(tensor.shape)
    kind = sizes.most_common(1)[0][0].name
    if kind == "F32":
        return LlamaFileType.ALL_F32
    return LlamaFileType["MOSTLY_" + _FILE_TYPES.get(kind, kind)]


def _model_entries(arch: str, config: ModelConfig, notes: list[str]) -> Entries:
    """`{arch}.*`: the decoder's sizes, norm epsilon and RoPE."""
    context = config.max_position_embeddings
    if config.sliding_window and config.sliding_window < context:
        context = config.sliding_window
        notes.append(f"llama.cpp attends to the whole context; context_length is set to the model's sliding "
                     f"window of {context} tokens, within which that is the same")
    values = {
        "vocab_size": u32(config.vocab_size),
        "context_length": u32(context),
        "embedding_length": u32(config.hidden_size),
        "block_count": u32(config.num_hidden_layers),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(config.num_key_value_heads),
        "attention.key_length": u32(config.head_dim),
        "attention.value_length": u32(config.head_dim),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "rope.dimension_count": u32(config.head_dim),
        "rope.freq_base": f32(config.rope_theta),
    }
    if (config.rope_scaling or {}).get("rope_type") == "linear":
        values |= {"rope.scaling.type": string("linear"),
                   "rope.scaling.factor": f32(config.rope_scaling["factor"])}
    return {f"{arch}.{key}": value for key, value in values.items()}


def special_ids(config: ModelConfig) -> dict[str, list[int]]:
    """Special token ids of config.json, several where it names several."""
    ids = {}
    for name in ("bos", "eos", "pad"):
        value = config.extra.get(f"{name}_token_id")
        found = [i for i in (value if isinstance(value, list) else [value])
                 if isinstance(i, int) and 0 <= i < config.vocab_size]
        if found:
            ids[name] = found
    return ids
