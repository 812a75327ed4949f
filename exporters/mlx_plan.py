"""What a checkpoint becomes in MLX: config.json, tensor names and shards, before any byte.

The layout is that of mlx-lm's own quantised models (`mlx_lm.utils.save_model`, `save_config`): Hugging Face names,
`.scales` and `.biases` beside each packed `.weight`, `quantization` with an entry for every module that differs from
the most frequent grid. Checked against mlx-lm 0.32.2.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

from optrot_edge.checkpoint import QuantizedCheckpoint, same_bits
from optrot_edge.errors import InputError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.folder_package import (
    ENTRY_DTYPES,
    FolderPlan,
    PlannedTensor,
    package_dtype,
    planned_tensors,
    provenance,
)
from optrot_edge.exporters.hf_config import hf_config
from optrot_edge.exporters.mlx_blocks import check_grid, pack, unpack
from optrot_edge.exporters.model_card import model_card
from optrot_edge.exporters.safetensors_file import Entry
from optrot_edge.gridspec import grid_spec
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family

MODEL_FILE = "optrot_model.py"  # `exporters/mlx_model_file.py`, in packages that stock mlx-lm cannot run alone


class Plan(FolderPlan):
    """An MLX package: words, scales and biases of a matrix, all floats in the dtype that the model computes in."""

    metadata = {"format": "mlx"}
    too_large = "choose --dtype bfloat16 or float32"

    def packed_entries(self, shape, spec):
        """As FolderPlan."""
        rows, columns = shape
        per_group = Entry(ENTRY_DTYPES[self.dtype], (rows, columns // spec.group_size))
        return {"weight": Entry("U32", (rows, columns * spec.bits // 32)), "scales": per_group, "biases": per_group}

    def pack(self, tensor, name):
        """As FolderPlan."""
        return pack(tensor)

    def is_same(self, parts, expected):
        """As FolderPlan."""
        found = unpack(parts, expected.spec).parts()
        return all(same_bits(found[name], part) for name, part in expected.parts().items())

    def card(self, manifest):
        """As FolderPlan."""
        return model_card(self.config, manifest, self.bits_per_weight)


def plan_mlx(checkpoint: QuantizedCheckpoint) -> Plan:
    """Plan the MLX package of `checkpoint`.

    Raises InputError for grids that MLX lacks or of different dtypes, for what stock mlx-lm cannot run, and for a
    checkpoint whose tensors contradict its model configuration.
    """
    family, config, shapes = expected_tensors(checkpoint)
    stored = checkpoint.manifest["tensors"]
    specs = {name: grid_spec(stored[name]["grid"]) if "grid" in stored[name] else None for name in shapes}
    for name, spec in specs.items():
        if spec is not None:
            check_grid(spec, name)
    dtype = package_dtype(checkpoint, specs, "mlx", "float16")
    tensors, notes = planned_tensors(family, shapes, specs), checkpoint.manifest.get("notes")
    plan = Plan({}, dtype, tensors, list(notes) if isinstance(notes, list) else [])
    plan.config = (model_config(family, config, plan.notes) | {"torch_dtype": dtype} | _quantization(tensors)
                   | _about(checkpoint.manifest, config))
    return plan


def _quantization(tensors: list[PlannedTensor]) -> dict:
    """`quantization` and its mirror: the grid of most weights, and the modules that differ."""
    sizes: Counter = Counter()
    for tensor in tensors:
        if tensor.spec is not None:
            sizes[tensor.spec.bits, tensor.spec.group_size] += prod(tensor.shape)
    if not sizes:
        return {}
    (bits, group_size), _ = sizes.most_common(1)[0]
    about: dict = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for tensor in tensors:
        if tensor.spec is None and len(tensor.shape) == 2:
            about[tensor.module] = False
        elif tensor.spec is not None and (tensor.spec.bits, tensor.spec.group_size) != (bits, group_size):
            about[tensor.module] = {"group_size": tensor.spec.group_size, "bits": tensor.spec.bits, "mode": "affine"}
    return {"quantization": about, "quantization_config": about}


def model_config(family: Family, config: ModelConfig, notes: list[str]) -> dict:
    """What mlx-lm reads of a model; InputError for what its models cannot be. Adds to `notes`."""
    if family.model_type == "qwen3" and config.extra.get("attention_bias"):
        raise InputError("mlx-lm's qwen3 has no attention biases; this model cannot become an MLX package")
    if family.model_type == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise InputError("mlx-lm's qwen2 needs heads · head_dim = hidden_size; this model cannot become an MLX package")
    context = config.max_position_embeddings
    if config.sliding_window and config.sliding_window < context:
        context = config.sliding_window
        notes.append(f"mlx-lm attends to the whole context; max_position_embeddings is set to the model's sliding "
                     f"window of {context} tokens, within which that is the same")
    return hf_config(family, replace(config, max_position_embeddings=context, sliding_window=None))


def _about(manifest: dict, config: ModelConfig) -> dict:
    """The package's own entries in config.json: what it was made by, what its runtime must do, and with what file."""
    about = provenance(manifest, config, "mlx")
    online = about["r3_block"] or about["r4_block"] or about["head_mix"]
    return {"optrot": about} | ({"model_file": MODEL_FILE} if online else {})
