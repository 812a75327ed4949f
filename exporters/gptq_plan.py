"""What a checkpoint becomes as a GPTQ folder: config.json and tensor names, before any byte.

Hugging Face names; `quantization_config` as AutoGPTQ and GPTQModel write it, with `dynamic` for modules that differ
from the grid of most weights. Its patterns end in `(\\.|$)`: GPTQModel and vLLM match them against a module's name, the
model builder of onnxruntime-genai against a tensor's. Checked against gptqmodel 7.7.0, optimum 2.3.0, transformers
5.23.0 and onnxruntime-genai 0.18.
"""

from __future__ import annotations

import re
from collections import Counter
from math import prod

from optrot_edge.checkpoint import QuantizedCheckpoint, same_bits
from optrot_edge.errors import InputError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.folder_package import FolderPlan, PlannedTensor, planned_tensors, provenance
from optrot_edge.exporters.gptq_blocks import check_grid, check_shape, lift_zeros, pack, unpack
from optrot_edge.exporters.hf_config import hf_config
from optrot_edge.exporters.model_card import gptq_card
from optrot_edge.exporters.safetensors_file import Entry
from optrot_edge.gridspec import grid_spec
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family

MIXED = ("modules of several grids, listed as `dynamic`: GPTQModel, vLLM and onnxruntime-genai's model builder read "
         "that, transformers with optimum does not")
FLOAT = ("float matrices among the layers, listed as `dynamic`: GPTQModel and vLLM read that, transformers with "
         "optimum and onnxruntime-genai's model builder do not")
HEAD = ("the head is quantised: GPTQModel, vLLM and onnxruntime-genai's model builder read that, transformers with "
        "optimum does not and would run with a random head")

ZEROS = ("zero-points off the middle: onnxruntime-genai's model builder, vLLM and transformers with optimum read them, "
         "GPTQModel's own loader refuses them in this format")

LINEAR = ("RoPE with linear scaling: onnxruntime-genai's model builder (0.18) gets such models wrong, "
          "float ones too")


class GptqPlan(FolderPlan):
    """A GPTQ folder: codes and zero-points in int32 words, floats and scales in float16."""

    too_large = "choose another --format"

    def packed_entries(self, shape, spec):
        """As FolderPlan."""
        (rows, columns), groups = shape, shape[1] // spec.group_size
        return {"qweight": Entry("I32", (columns * spec.bits // 32, rows)),
                "qzeros": Entry("I32", (groups, rows * spec.bits // 32)),
                "scales": Entry("F16", (groups, rows)), "g_idx": Entry("I32", (columns,))}

    def pack(self, tensor, name):
        """As FolderPlan."""
        return pack(tensor, name)

    def is_same(self, parts, expected):
        """As FolderPlan."""
        try:
            found = unpack(parts, expected.spec)
        except ValueError:
            return False
        wanted = (expected if expected.offsets is None else lift_zeros(expected)).parts()
        return all(same_bits(found.parts()[name], part) for name, part in wanted.items())

    def card(self, manifest):
        """As FolderPlan."""
        return gptq_card(self.config, manifest, self.bits_per_weight)


def plan_gptq(checkpoint: QuantizedCheckpoint) -> GptqPlan:
    """Plan the GPTQ folder of `checkpoint`.

    Raises InputError for grids, shapes and rotations that the format lacks, for a model that Hugging Face's config.json
    cannot describe, and for a checkpoint whose tensors contradict its model configuration.
    """
    family, config, shapes = expected_tensors(checkpoint)
    rotation = checkpoint.manifest.get("rotation") or {}
    refuse_model(family, config, rotation.get("r3_block"), rotation.get("r4_block"))
    stored = checkpoint.manifest["tensors"]
    specs = {name: grid_spec(stored[name]["grid"]) if "grid" in stored[name] else None for name in shapes}
    for name, spec in specs.items():
        if spec is None:
            continue
        if name == "embed_tokens.weight":
            raise InputError("embed_tokens.weight is quantised, and GPTQ's format has float embeddings only; choose "
                             "--embedding-type f16, and --head-type f16 too where the head is tied to it")
        check_grid(spec, name)
        check_shape(shapes[name], spec, name)
    if not any(specs.values()):
        raise InputError(f"{checkpoint.path} holds no quantised matrix; a GPTQ folder needs one: choose a --type such "
                         "as int4-g128-sym-f16")
    tensors, notes = planned_tensors(family, shapes, specs), checkpoint.manifest.get("notes")
    plan = GptqPlan({}, "float16", tensors, list(notes) if isinstance(notes, list) else [])
    plan.config = (hf_config(family, config) | {"torch_dtype": plan.dtype}
                   | {"quantization_config": _quantization(tensors, plan.notes),
                      "optrot": provenance(checkpoint.manifest, config, "gptq")})
    if (config.rope_scaling or {}).get("rope_type") == "linear":
        plan.notes.append(LINEAR)
    version = plan.config["optrot"]["version"]
    plan.config["quantization_config"]["meta"] = {"quantizer": [f"optrot-edge:{version}" if version else "optrot-edge"]}
    return plan


def refuse_model(family: Family, config: ModelConfig, r3_block: int | None = None,
                 r4_block: int | None = None) -> None:
    """InputError for what no reader of GPTQ folders computes: R3, R4, a head tied through a matrix, a table of RoPE
    factors."""
    if (config.rope_scaling or {}).get("rope_type", "linear") not in family.rope_scalings:
        raise InputError("a config.json cannot hold this model's RoPE factors, which come from a GGUF; start from the "
                         "model's Hugging Face folder")
    for name, block in (("r3", r3_block), ("r4", r4_block)):
        if block:
            raise InputError(f"the checkpoint needs the online rotation {name.upper()}, which readers of GPTQ folders "
                             "lack and would leave out; quantise again with --rotate r1,r2")
    if config.head_mix:
        raise InputError("the head is tied to the embedding through a matrix, which readers of GPTQ folders lack; "
                         "quantise again with --rotate r1,r2, which unties it")


def _quantization(tensors: list[PlannedTensor], notes: list[str]) -> dict:
    """`quantization_config`: the grid of most weights and the modules that differ. Adds to `notes`."""
    sizes: Counter = Counter()
    for tensor in tensors:
        if tensor.spec is not None:
            sizes[tensor.spec.bits, tensor.spec.group_size] += prod(tensor.shape)
    (bits, group_size), _ = sizes.most_common(1)[0]
    symmetric = all(tensor.spec is None or tensor.spec.kind == "symmetric" for tensor in tensors)
    dynamic, found = {}, set()
    for tensor in tensors:
        pattern = f"^{re.escape(tensor.module)}(\\.|$)"
        if tensor.spec is None:
            if len(tensor.shape) == 2 and tensor.source.startswith("layers."):
                dynamic[f"-:{pattern}"] = {}
                found.add(FLOAT)
            continue
        if tensor.module == "lm_head":
            found.add(HEAD)
        if (tensor.spec.bits, tensor.spec.group_size) != (bits, group_size):
            dynamic[f"+:{pattern}"] = {"bits": tensor.spec.bits, "group_size": tensor.spec.group_size}
            found.add(MIXED)
    if not symmetric:
        found.add(ZEROS)
    notes += [note for note in (ZEROS, MIXED, FLOAT, HEAD) if note in found]
    about = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group_size,
             "sym": symmetric, "desc_act": False, "lm_head": HEAD in found, "pack_dtype": "int32"}
    return about | ({"dynamic": dynamic} if dynamic else {})
