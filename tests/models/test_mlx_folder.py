"""MLX folders by their headers alone, held against what mlx and mlx_lm make of them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optrot_edge.errors import InputError
from optrot_edge.inspect import inspect_path
from optrot_edge.models.mlx_folder import MlxFolder, MlxTensor, is_mlx
from tests.mlx_models import edit_config

nn = pytest.importorskip("mlx.nn")
mlx_lm = pytest.importorskip("mlx_lm")


def quantised(bits, group, mode="affine"):
    return {"quantize": True, "q_bits": bits, "q_group_size": group, "q_mode": mode}


def loaded_kinds(folder):
    """Types of the quantised matrices as mlx_lm loads them, by name."""
    model, _ = mlx_lm.utils.load_model(folder)
    kinds = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "bits")}
    return {name: f"{m.bits}-bit g{m.group_size}" if m.mode == "affine" else m.mode for name, m in kinds.items()}


@pytest.mark.parametrize("case", ["llama", "smollm2", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [
    quantised(4, 32), quantised(3, 32), quantised(4, 32, "mxfp4"), quantised(8, 32, "mxfp8"),
    {"quantize": True, "q_group_size": 32, "quant_predicate": "mixed_2_6"},
], ids=["4-bit", "3-bit", "mxfp4", "mxfp8", "mixed"])
def test_types_and_sizes(mlx, case, options):
    source, path = mlx(case, **options)
    folder = MlxFolder(path)
    tensors = folder.tensors
    expected = loaded_kinds(path)
    assert len(expected) > 10
    assert {name: tensor.kind for name, tensor in tensors.items() if tensor.kind != "float32"} == expected
    floats = load_file(source / "model.safetensors")
    assert {name: tensor.weights for name, tensor in tensors.items()} == {name: w.size for name, w in floats.items()}
    stored = sum(array.nbytes for array in load_file(path / "model.safetensors").values())
    assert sum(tensor.bits for tensor in tensors.values()) == 8 * stored
    assert folder.bits_per_weight == 8 * stored / sum(w.size for w in floats.values())
    assert folder.tied_head == (case in ("smollm2", "qwen2"))
    assert folder.written_by_mlx and not MlxFolder(source).written_by_mlx
    assert is_mlx(path) and not is_mlx(source)


@pytest.mark.parametrize(("stored", "listed"), [((4, 32), {"bits": 8, "group_size": 32}), ((2, 64), {"bits": 3}),
                                                ((4, 32), {"bits": 2, "group_size": 64})])
def test_a_matrix_without_an_entry_goes_by_its_width(mlx, copied, stored, listed):
    """As in mlx_lm. 4 bits in groups of 32 and 2 bits in groups of 64 take the same room."""
    options = quantised(*stored) if stored[1] == 32 else quantised(*stored) | {"q_group_size": 64}
    path = copied(mlx("wide", **options)[1])
    general = {"group_size": stored[1], "bits": stored[0], **listed}
    edit_config(path, quantization=general, quantization_config=None)
    kinds = {tensor.kind for tensor in MlxFolder(path).tensors.values()} - {"float32"}
    assert kinds == set(loaded_kinds(path).values()) == {f"{stored[0]}-bit g{stored[1]}"}


def test_unquantised(mlx):
    folder = MlxFolder(mlx("llama")[1])
    assert folder.bits_per_weight == 32 and folder.written_by_mlx
    assert folder.tensors["model.norm.weight"] == MlxTensor("float32", 96, 96 * 32)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 16), ("float16", 16), ("float32", 32)])
def test_half_precision(tmp_path, dtype, width):
    """Scales and biases take the model's dtype; 3 bits in groups of 64 are 3.5 with those of 16 bits."""
    import mlx.core as mx

    weight, scales, biases = mx.quantize(mx.ones((5, 128), getattr(mx, dtype)), group_size=64, bits=3)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {
        "a.q_proj.weight": weight, "a.q_proj.scales": scales, "a.q_proj.biases": biases,
        "a.q_proj.bias": mx.ones(5, getattr(mx, dtype))}, {"format": "mlx"})
    (tmp_path / "config.json").write_text('{"quantization": {"group_size": 64, "bits": 3}}')
    assert MlxFolder(tmp_path).tensors == {
        "a.q_proj.weight": MlxTensor("3-bit g64", 640, 640 * 3 + 20 * width),
        "a.q_proj.bias": MlxTensor(dtype, 5, 5 * width)}


def test_inspect(mlx, copied):
    path = copied(mlx("llama", **quantised(4, 32))[1])
    about = inspect_path(path)
    bits = MlxFolder(path).bits_per_weight
    matrices = 2 * 512 * 96 + 2 * (2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 160)
    assert about["types"] == {"4-bit g32": {"tensors": 16, "weights": matrices},
                              "float32": {"tensors": 5, "weights": 5 * 96}}
    assert about["bits_per_weight"] == bits == (6 * matrices + 32 * 480) / (matrices + 480)
    assert (about["kind"], about["model_type"]) == ("MLX package", "llama")
    assert (about["layers"], about["hidden_size"], about["context_length"]) == (2, 96, 256)
    assert about["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert not about["tied_head"] and not about["needs_trust_remote_code"] and about["rotation"] is None
    edit_config(path, model_file="own.py", optrot={
        "format": "mlx", "format_version": 1, "warnings": ["careful"],
        "rotation": "optrot", "applied": ["r1", "r2", "r4"], "r4_block": 32, "seed": 0})
    about = inspect_path(path)
    assert (about["rotation"], about["applied"], about["r4_block"]) == ("optrot", ["r1", "r2", "r4"], 32)
    assert about["warnings"] == ["careful"] and about["needs_trust_remote_code"]
    json.dumps(about)


def test_ours_is_mlx_without_quantised_matrices(mlx, copied):
    path = edit_config(copied(mlx("llama")[1]), optrot={"format": "mlx", "format_version": 1})
    assert is_mlx(path) and inspect_path(path)["types"].keys() == {"float32"}
    edit_config(path, optrot={"format": "mlx", "format_version": 3})
    with pytest.raises(InputError, match="newer optrot-edge"):
        inspect_path(path)


def test_damage(mlx, copied, tmp_path):
    path = copied(mlx("llama", **quantised(4, 32))[1])
    arrays, name = load_file(path / "model.safetensors"), "model.layers.1.mlp.down_proj"
    for change, match in (({f"{name}.scales": arrays[f"{name}.scales"][1:]}, "do not fit"),
                          ({f"{name}.scales": arrays[f"{name}.scales"][:, :3]}, "does not say how"),
                          ({f"{name}.scales": arrays[f"{name}.scales"][:, :0]}, "do not fit"),
                          ({f"{name}.scales": np.float32(1)}, "do not fit"),
                          ({f"{name}.weight": np.uint32(1)}, "do not fit")):
        save_file({key: np.asarray(value) for key, value in (arrays | change).items()}, path / "model.safetensors")
        with pytest.raises(InputError, match=match):
            _ = MlxFolder(path).tensors
    index = path / "model.safetensors.index.json"
    for content, match in (("{}", "weight_map"), ('{"weight_map": {"a": 1}}', "weight_map"), ("[", "JSON"),
                           ('{"weight_map": {"a": "model-2.safetensors"}}', "shard model-2.safetensors")):
        index.write_text(content)
        with pytest.raises(InputError, match=match):
            MlxFolder(path)
    index.unlink()
    (path / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(InputError, match="truncated or damaged"):
        MlxFolder(path)
    shutil.rmtree(path)
    path.mkdir()
    with pytest.raises(InputError, match="config.json is missing"):
        MlxFolder(path)
