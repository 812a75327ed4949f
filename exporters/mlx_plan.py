"""What a checkpoint becomes in MLX: config.json, tensor names and shards, before any byte.

The layout is that of mlx-lm's own quantised models (`mlx_lm.utils.save_model`, `save_config`): Hugging Face names,
`.scales` and `.biases` beside each packed `.weight`, `quantization` with an entry for every module that differs from
the most frequent grid. Checked against mlx-lm 0.32.2.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.hf_config import about_package, hf_config
from optrot_edge.exporters.mlx_blocks import check_grid
from optrot_edge.exporters.safetensors_file import Entry
from optrot_edge.gridspec import GridSpec, grid_spec
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX, Family
from optrot_edge.models.mlx_folder import FORMAT_VERSION

SHARD_BYTES = 5 * 10**9  # as mlx-lm cuts them
MODEL_FILE = "optrot_model.py"  # `exporters/mlx_model_file.py`, in packages that stock mlx-lm cannot run alone
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the checkpoint (`source`) and where it goes: `module` is its Hugging Face name without the suffix
    `kind`; `spec` its grid, None for a float tensor."""

    source: str
    module: str
    kind: str
    shape: tuple[int, ...]
    spec: GridSpec | None

    def entries(self, dtype: str) -> dict[str, Entry]:
        """The package's tensors by name, for a package of `dtype`."""
        if self.spec is None:
            return {f"{self.module}.{self.kind}": Entry(_DTYPES[dtype], self.shape)}
        rows, columns = self.shape
        per_group = Entry(_DTYPES[dtype], (rows, columns // self.spec.group_size))
        return {f"{self.module}.weight": Entry("U32", (rows, columns * self.spec.bits // 32)),
                f"{self.module}.scales": per_group, f"{self.module}.biases": per_group}


@dataclass
class Plan:
    """Everything but the tensors' data. `shards` are lists of tensors; `notes` are remarks for the user."""

    config: dict
    dtype: str
    tensors: list[PlannedTensor]
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of the model's weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def size_of(self, tensor: PlannedTensor) -> int:
        """Bytes of a tensor in the package."""
        return sum(entry.nbytes for entry in tensor.entries(self.dtype).values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.size_of, self.tensors))

    def shards(self) -> dict[str, list[PlannedTensor]]:
        """Tensors by file name; a file holds at most SHARD_BYTES, or one tensor."""
        parts, size = [[]], 0
        for tensor in self.tensors:
            if parts[-1] and size + self.size_of(tensor) > SHARD_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(tensor)
            size += self.size_of(tensor)
        if len(parts) == 1:
            return {"model.safetensors": parts[0]}
        return {f"model-{index:05d}-of-{len(parts):05d}.safetensors": part for index, part in enumerate(parts, 1)}


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
    dtype = _dtype(checkpoint, specs)
    tensors = []
    for name, shape in shapes.items():
        module, _, kind = (name if name == HEAD_MIX else family.hf_name(name)).rpartition(".")
        tensors.append(PlannedTensor(name, module, kind, shape, specs[name]))
    tensors.sort(key=lambda tensor: not tensor.source.startswith("layers."))  # small offsets make a smaller header
    notes = checkpoint.manifest.get("notes")
    plan = Plan({}, dtype, tensors, list(notes) if isinstance(notes, list) else [])
    plan.config = (model_config(family, config, plan.notes) | {"torch_dtype": dtype} | _quantization(tensors)
                   | _about(checkpoint.manifest, config))
    return plan


def _dtype(checkpoint: QuantizedCheckpoint, specs: dict[str, GridSpec | None]) -> str:
    """The one dtype of all scales, or what the recipe says where nothing is quantised."""
    found = {spec.scale_dtype for spec in specs.values() if spec is not None}
    if len(found) > 1:
        raise InputError(f"{checkpoint.path} holds scales of {' and '.join(sorted(found))}; an MLX package has one "
                         "dtype: quantise again with --format mlx and --dtype")
    recipe = checkpoint.manifest.get("recipe") or {}
    return found.pop() if found else recipe.get("dtype") or "float16"


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
    return hf_config(family, replace(config, max_position_embeddings=context))


def _about(manifest: dict, config: ModelConfig) -> dict:
    """The package's own entries in config.json: what it was made by, what its runtime must do, and with what file."""
    about = about_package(manifest, config, "mlx", FORMAT_VERSION)
    online = about["r3_block"] or about["r4_block"] or about["head_mix"]
    return {"optrot": about} | ({"model_file": MODEL_FILE} if online else {})
