"""QuantizedCheckpoint → ONNX package: the frozen codes packed as they are, verified before the folder is named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from optrot_edge.checkpoint import QuantizedCheckpoint, QuantizedTensor, same_bits
from optrot_edge.exporters.folder_package import (
    PlannedTensor,
    Progress,
    check_place,
    load_checked,
    make_folder,
    summary,
)
from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer
from optrot_edge.exporters.model_card import onnx_card
from optrot_edge.exporters.onnx_graph import arrays, write_graph
from optrot_edge.exporters.onnx_modules import Load
from optrot_edge.exporters.onnx_plan import Plan, plan_onnx


def export_onnx(checkpoint: QuantizedCheckpoint, out: str | Path, *, overwrite: bool = False,
                execution_provider: str = "cpu", accuracy_level: int = 0, progress: Progress | None = None) -> dict:
    """Write `checkpoint` as the folder `out` that onnxruntime, onnxruntime-genai and transformers.js read; verify it.

    `execution_provider` is "cpu", "cuda", "dml" or "webgpu"; `accuracy_level` 0 or 4, MatMulNBits' activations in float
    or in int8. `overwrite` replaces a package or an empty folder, nothing else; `progress` is called with (bytes done,
    bytes in all, what was done), where writing and verifying each count every byte once. Returns `path`, `bytes`,
    `weights`, `bits_per_weight` (all tensors over all weights), `tensors` (how many of the model's), `dtype`, `notes`.

    Nothing stays when this fails, see `make_folder`. Raises InputError for bad input (see `plan_onnx`), StorageError
    when the disk refuses, RuntimeError if what was written is not the checkpoint.
    """
    out = Path(out)
    check_place(out, overwrite, "onnx")
    plan = plan_onnx(checkpoint, execution_provider=execution_provider, accuracy_level=accuracy_level)
    report = progress or (lambda done, total, what: None)

    def load(tensor: PlannedTensor) -> QuantizedTensor | np.ndarray:
        return load_checked(tensor, checkpoint, plan)

    def fill(folder: Path) -> None:
        _write(plan, checkpoint, load, folder, report)
        _verify(plan, load, folder, report)

    return summary(plan, out, make_folder(out, plan.nbytes, fill))


def _write(plan: Plan, checkpoint: QuantizedCheckpoint, load: Load, folder: Path, report: Progress) -> None:
    done = 0

    def progress(count: int, name: str) -> None:
        nonlocal done
        done += count
        report(min(done, plan.nbytes), 2 * plan.nbytes, f"wrote {name}")

    (folder / "config.json").write_text(json.dumps(plan.config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_hf_tokenizer(checkpoint.path / "tokenizer", folder, plan.model)
    _embed_template(folder)
    write_graph(plan, load, folder, progress)
    card = onnx_card(plan.config, checkpoint.manifest, plan.bits_per_weight)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _embed_template(folder: Path) -> None:
    """Put chat_template.jinja into tokenizer_config.json too, where alone transformers.js looks for it."""
    template, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file() and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template.read_text(encoding="utf-8")}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(plan: Plan, load: Load, folder: Path, report: Progress) -> None:
    """RuntimeError unless onnx accepts the graph and every tensor reads back as it is in the checkpoint, to the bit."""
    path, done = folder / plan.filename, plan.nbytes
    check_graph(path)
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {}
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            about = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            for name in node.input:
                nodes.setdefault(name, []).append(about)
    for tensor in plan.tensors:
        (_, rows), names, expected = plan.place(tensor), _names(plan, tensor, stored), arrays(tensor, load)
        if not names and (tensor.kind != "bias" or expected["weight"].any()):  # the builder leaves zeros out
            raise RuntimeError(f"{path}: {tensor.source} was not written")
        for part, name in names.items():
            read = _read(stored[name], path.parent)
            if not same_bits(read if part == "weight_t" else read[rows], np.ascontiguousarray(expected[part])):
                raise RuntimeError(f"{path}: {name} read back differently")
        if tensor.spec is not None and not all(
                about["bits"] == tensor.spec.bits and about["block_size"] == tensor.spec.group_size
                for about in nodes.get(names["scales"], ())):
            raise RuntimeError(f"{path}: {tensor.module} is computed with other bits or blocks")
        done += plan.size_of(tensor)
        report(done, 2 * plan.nbytes, f"verified {tensor.module}")


def check_graph(path: Path) -> None:
    """RuntimeError unless onnx's checker and its strict shape inference accept the graph at `path`, data and all.

    onnxruntime keeps SimplifiedLayerNormalization in onnx's own domain, where onnx does not know it: the two see a copy
    in which it is where onnxruntime's other operators are.
    """
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as copy:
        copy.write(model.SerializeToString())
        copy.flush()
        try:
            onnx.checker.check_model(copy.name)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise RuntimeError(f"{path} is not valid ONNX: {error}") from error


def _names(plan: Plan, tensor: PlannedTensor, stored: dict) -> dict[str, str]:
    """The parts of a tensor in the file, by the names that they have there; {} where one is missing."""
    module, _ = plan.place(tensor)
    if tensor.spec is not None:
        names = {part: f"{module}.{part}" for part in plan.entries(tensor)}
        return names if all(name in stored for name in names.values()) else {}
    if len(tensor.shape) == 2:
        names = {part: f"{module}.{part}" for part in ("weight", "weight_t")}
        return {part: name for part, name in names.items() if name in stored}
    name = _builders_name(tensor.source, module, plan.model.num_hidden_layers)
    return {"weight": name} if name in stored else {}


def _builders_name(source: str, module: str, layers: int) -> str:
    """What the builder calls a vector of the model, which is that of `module`."""
    if source == "norm.weight":
        return f"model.layers.{layers}.final_norm_layernorm.weight"
    _, index, stem, kind = source.split(".")
    if stem in ("attn_norm", "mlp_norm"):
        return f"model.layers.{index}.{'input' if stem == 'attn_norm' else 'post_attention'}_layernorm.weight"
    if stem in ("q_norm", "k_norm"):
        return f"model.layers.{index}.attn.{stem}.layernorm.weight"
    stem = module.rpartition(".")[2]
    return f"model.layers.{index}.{'attn' if stem[0] in 'qkvo' else 'mlp'}.{stem}.Add.{kind}"


def _read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place, dtype = ExternalDataInfo(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims))
    return np.fromfile(folder / place.location, dtype, count, offset=place.offset or 0).reshape(tuple(tensor.dims))
