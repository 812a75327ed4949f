"""GPTQ folders in real readers: onnxruntime-genai's model builder, GPTQModel, and transformers with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters import folder_package
from optrot_edge.exporters.gptq import export_gptq, plan_gptq
from optrot_edge.exporters.hf_config import hf_config
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import get_family
from optrot_edge.models.forward import logits
from optrot_edge.models.hf_config import parse_config
from tests.cli_runner import left, refused, run_ok
from tests.exporters.folder_checks import nothing_is_left_of_a_failure, only_packages_are_replaced
from tests.exporters.gguf_models import Decoded
from tests.exporters.test_gptq_blocks import decode
from tests.test_pipeline import length_of, original_logits, spread
from tests.tiny_models import CASES, random_tokens

RTN = {"quantizer": "rtn", "calibration": "none", "rotation": "none", "embedding_type": "f16", "head_type": "f16"}
GRIDS = ["int4-g32-sym-f16", "int4-g16-zero-f16", "int8-g32-zero-f16", "int2-g16-zero-f16", "int8-g16-sym-f16",
         "int4-g32-zero-f16"]

BUILT = [case for case in CASES if case != "llama_linear_rope"]  # which the builder gets wrong in float too


class Half(Decoded):
    """The weights that a GPTQ folder holds: of float tensors, what float16 leaves."""

    def _tensor(self, name: str, dtype) -> torch.Tensor:
        tensor = torch.from_numpy(self.checkpoint.weights(name))
        return (tensor.half() if isinstance(self.checkpoint.get(name), np.ndarray) else tensor).to(dtype)


def expected_logits(path, tokens) -> np.ndarray:
    checkpoint = QuantizedCheckpoint(path)
    return logits(Half(checkpoint, ModelConfig.from_dict(checkpoint.manifest["model"])), tokens)[0].numpy()


def built_logits(package: Path, out: Path, tokens, exclude: str = "nodes_to_exclude=/lm_head/MatMul") -> np.ndarray:
    """What onnxruntime computes with the model that onnxruntime-genai's builder makes of a folder."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    import onnxruntime
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    where = (None, str(package), str(out), "int4", "cpu", str(out / "cache"))
    options = parse_extra_options(*where, ["accuracy_level=0", *([exclude] if exclude else [])])
    create_model(*where, **(options if isinstance(options, dict) else options[-1]))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    config, length = json.loads((package / "config.json").read_text()), tokens.shape[1]
    past = np.zeros((1, config["num_key_value_heads"], 0, config["head_dim"]), np.float32)
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones((1, length), np.int64),
             "position_ids": np.arange(length)[None]}
    return session.run(["logits"], {value.name: feeds.get(value.name, past) for value in session.get_inputs()})[0][0]


@pytest.fixture
def checkpoint(model, tmp_path):
    return pipeline.quantize(model("llama"), tmp_path / "c", type="int4-g32-sym-f16", **RTN)


@pytest.mark.parametrize("case", BUILT)
def test_the_model_builder_computes_what_the_checkpoint_says(case, model, tmp_path):
    kind = GRIDS[BUILT.index(case) % len(GRIDS)]
    path = pipeline.quantize(model(case), tmp_path / "c", type=kind,
                             **RTN | {"rotation": "hadamard", "rotate": "r1,r2"})
    export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    tokens = random_tokens(1, length_of(case))
    found = built_logits(tmp_path / "package", tmp_path / "onnx", tokens)
    assert np.abs(found - expected_logits(path, tokens)).max() < 1e-4
    _, lost = spread(found, original_logits(model(case), tokens))
    assert lost < (2 if kind.startswith("int2") else 0.6)


def test_the_model_builder_reads_other_grids_and_a_quantised_head(model, tmp_path):
    path = pipeline.quantize(model("llama"), tmp_path / "c", type="int4-g32-sym-f16",
                             **RTN | {"head_type": "int8-g16-zero-f16"}, tensor_type=["down_proj=int8-g32-zero-f16"])
    summary = export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    about = json.loads((tmp_path / "package/config.json").read_text())["quantization_config"]
    assert (about["bits"], about["group_size"], about["sym"], about["lm_head"]) == (4, 32, False, True)
    assert about["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.down_proj(\.|$)": {"bits": 8, "group_size": 32},
        r"+:^model\.layers\.1\.mlp\.down_proj(\.|$)": {"bits": 8, "group_size": 32},
        r"+:^lm_head(\.|$)": {"bits": 8, "group_size": 16}}
    assert [note.split(":")[0] for note in summary["notes"]] == [
        "zero-points off the middle", "modules of several grids, listed as `dynamic`", "the head is quantised"]
    tokens = random_tokens(1, 24)
    found = built_logits(tmp_path / "package", tmp_path / "onnx", tokens, exclude="")
    assert np.abs(found - expected_logits(path, tokens)).max() < 1e-4


def in_gptqmodel(package: Path) -> torch.nn.Module:
    """GPTQModel's own model of a folder, on its CPU kernel."""
    import gptqmodel

    return gptqmodel.GPTQModel.load(str(package), device="cpu", backend=gptqmodel.BACKEND.TORCH,
                                    dtype=torch.float16).model


def decoded_alike(loaded: torch.nn.Module, opened: QuantizedCheckpoint) -> int:
    """How many matrices GPTQModel's kernels decode to float16's nearest to the checkpoint's; fails for any other."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    modules = {name: module for name, module in loaded.named_modules() if isinstance(module, BaseQuantLinear)}
    for name in opened.names:
        if module := modules.get(get_family("llama").hf_name(name).removesuffix(".weight")):
            weights = module.dequantize_weight().T.to(torch.float16).numpy()
            assert np.array_equal(weights, opened.weights(name).astype(np.float16)), name
    return len(modules)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4-g32-sym-f16", "int2-g16-zero-f16"])
def test_transformers_with_gptqmodel_decodes_the_weights(kind, model, tmp_path):
    """Weights as float16 has them, logits to its rounding."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    pytest.importorskip("optimum", reason="optimum is not installed")
    from transformers import AutoModelForCausalLM

    path = pipeline.quantize(model("llama"), tmp_path / "c", type=kind, **RTN)
    export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    tokens = random_tokens(1, 24)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "package", dtype=torch.float32)
    assert decoded_alike(loaded, QuantizedCheckpoint(path)) == 14
    with torch.no_grad():
        worst, _ = spread(loaded(tokens).logits[0].numpy(), expected_logits(path, tokens))
    assert worst < 5e-3


@pytest.mark.slow
def test_gptqmodel_reads_other_grids_and_a_quantised_head(model, tmp_path):
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    options = RTN | {"type": "int4-g32-sym-f16", "head_type": "int8-g16-sym-f16",
                     "tensor_type": ["down_proj=int8-g32-sym-f16", "layers.0.v_proj=f16"]}
    path = pipeline.quantize(model("llama"), tmp_path / "c", **options)
    export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    assert decoded_alike(in_gptqmodel(tmp_path / "package"), QuantizedCheckpoint(path)) == 14
    path = pipeline.quantize(model("llama"), tmp_path / "z", type="int4-g32-zero-f16", **RTN)
    export_gptq(QuantizedCheckpoint(path), tmp_path / "zeros")
    with pytest.raises(ValueError, match="sym=False"):
        in_gptqmodel(tmp_path / "zeros")


@pytest.mark.parametrize("kind", GRIDS)
def test_files_hold_the_weights(kind, model, tmp_path):
    path = pipeline.quantize(model("qwen3"), tmp_path / "c", type=kind, **RTN)
    summary = export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    opened, arrays = QuantizedCheckpoint(path), load_file(tmp_path / "package/model.safetensors")
    assert summary["dtype"] == "float16" and summary["tensors"] == len(opened.names)
    for name in opened.names:
        hf = get_family("qwen3").hf_name(name)
        if hf in arrays:
            assert arrays[hf].dtype == np.float16
            assert np.array_equal(arrays[hf], opened.weights(name).astype(np.float16))
        else:
            parts = {part: arrays[f"{hf.removesuffix('weight')}{part}"]
                     for part in ("qweight", "qzeros", "scales", "g_idx")}
            assert np.array_equal(decode(parts, opened.get(name).spec.bits), opened.weights(name))


@pytest.mark.parametrize("case", CASES)
def test_config_is_read_back_as_the_model(case, model):
    """This project's reader and transformers' see the model that was packaged."""
    from transformers import AutoConfig

    family, config = parse_config(json.loads((model(case) / "config.json").read_text()), "x")
    again = hf_config(family, config)
    assert parse_config(again, "x")[1].to_dict() == config.to_dict()
    theirs, ours = AutoConfig.from_pretrained(model(case)), AutoConfig.for_model(**again)
    for name in ("rope_parameters", "sliding_window", "tie_word_embeddings", "eos_token_id"):
        assert getattr(ours, name, None) == getattr(theirs, name, None), name


def test_float_matrices_among_the_layers_are_listed(model, tmp_path):
    path = pipeline.quantize(model("llama"), tmp_path / "c", type="q4_0", **RTN, tensor_type=["layers.0.v_proj=f16"])
    summary = export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    about = json.loads((tmp_path / "package/config.json").read_text())["quantization_config"]
    assert about["dynamic"] == {r"-:^model\.layers\.0\.self_attn\.v_proj(\.|$)": {}}
    assert about["sym"] and "float matrices among the layers" in summary["notes"][0]


def test_shards_and_their_index(checkpoint, tmp_path, monkeypatch):
    export_gptq(QuantizedCheckpoint(checkpoint), tmp_path / "whole")
    monkeypatch.setattr(folder_package, "SHARD_BYTES", 30_000)
    export_gptq(QuantizedCheckpoint(checkpoint), tmp_path / "package")
    files = sorted(path.name for path in (tmp_path / "package").glob("*.safetensors"))
    index = json.loads((tmp_path / "package/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole/model.safetensors")
    stored = {name: file for file in files for name in load_file(tmp_path / "package" / file)}
    assert len(files) > 2 and stored == index["weight_map"] and stored.keys() == whole.keys()
    for name, file in stored.items():
        assert np.array_equal(load_file(tmp_path / "package" / file)[name], whole[name])


@pytest.mark.parametrize("options, says", [
    ({"type": "int4-g32-sym"}, "grid int4-g32-sym, which GPTQ's format lacks; quantise to int"),
    ({"type": "q4_1"}, "grid q4_1, which GPTQ's format lacks"),
    ({"type": "int4-g32-sym-f16", "embedding_type": "q8_0"}, "float embeddings only; choose --embedding-type f16"),
    ({"type": "f16"}, "holds no quantised matrix"),
    ({"type": "int4-g32-sym-f16", "rotation": "hadamard", "rotate": "r1,r2,r4", "r4_block": 32},
     "the online rotation R4, .* quantise again with --rotate r1,r2"),
])
def test_what_the_format_lacks_is_refused(options, says, model, tmp_path):
    path = pipeline.quantize(model("llama"), tmp_path / "c", **RTN | options)
    with pytest.raises(InputError, match=says):
        plan_gptq(QuantizedCheckpoint(path))
    with pytest.raises(InputError, match=says):
        export_gptq(QuantizedCheckpoint(path), tmp_path / "package")
    assert left(tmp_path) == ["c"]


def test_only_packages_are_replaced(checkpoint, tmp_path, capfd):
    only_packages_are_replaced(checkpoint, tmp_path, capfd, "gptq")


def test_nothing_is_left_of_a_failure(checkpoint, tmp_path):
    nothing_is_left_of_a_failure(checkpoint, tmp_path, export_gptq)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_damage_is_seen_when_read_back(part, checkpoint, tmp_path, monkeypatch):
    name = f"model.layers.1.mlp.up_proj.{part}"

    def damaged(path, entries, arrays, metadata):
        write(path, entries, ((key, array + array.dtype.type(1) if key == name else array) for key, array in arrays),
              metadata)

    write = folder_package.write_safetensors
    monkeypatch.setattr(folder_package, "write_safetensors", damaged)
    with pytest.raises(RuntimeError, match="up_proj read back differently"):
        export_gptq(QuantizedCheckpoint(checkpoint), tmp_path / "package")
    assert left(tmp_path) == ["c"]


def test_the_command_writes_one(model, tmp_path, capfd):
    """`export --format gptq`: symmetric groups, embedding and head in float16; what the format lacks is refused."""
    run_ok("export", model("smollm2"), "--format", "gptq", "--group-size", "32", "--rotation", "hadamard",
           "--quantizer", "rtn", "--calibration", "none", "--out", tmp_path / "package", "-q")
    grid = json.loads((tmp_path / "package/config.json").read_text())["quantization_config"]
    assert (grid["bits"], grid["group_size"], grid["sym"], grid["lm_head"]) == (4, 32, True, False)
    for options, says in ((["--rotate", "r1,r4", "--rotation", "hadamard"], "needs the online rotation R4"),
                          (["--embedding-type", "8bit"], "float embeddings only"),
                          (["--bits", "3"], "GPTQ stores 2, 4, 8"),
                          (["--head-type", "4bit"], "head is tied to its embedding"),
                          (["--execution-provider", "cpu"], "is for --format onnx"),
                          (["--dtype", "float32"], "--dtype float32: use float16")):
        refused(capfd, "export", model("smollm2"), "--format", "gptq", "--group-size", "32", "--out", tmp_path / "x",
                *options, says=says)
    assert left(tmp_path) == ["package"]
