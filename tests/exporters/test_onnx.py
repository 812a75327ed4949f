"""ONNX packages in the real onnxruntime and onnxruntime-genai: weight for weight and logit for logit."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.onnx import check_graph, export_onnx
from optrot_edge.models.onnx_folder import OnnxFolder
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.cli_runner import left, refused
from tests.exporters.folder_checks import nothing_is_left_of_a_failure, only_packages_are_replaced
from tests.road import write_text
from tests.test_pipeline import original_logits, spread
from tests.tiny_models import CASES, random_tokens

RTN = {"quantizer": "rtn", "calibration": "none", "rotation": "none", "format": "onnx"}


@pytest.fixture
def checkpoint(model, tmp_path):
    """A checkpoint of three types."""
    return pipeline.quantize(model("llama"), tmp_path / "c", tensor_type=["down_proj=8bit-g16", "layers.0.v_proj=f32"],
                             **RTN)


def graph_of(folder):
    """The one graph of a package."""
    path, = folder.glob("onnx/*.onnx")
    return path


def onnx_logits(folder, tokens) -> np.ndarray:
    """Logits of one sequence [1, n] in onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(str(graph_of(folder)), providers=["CPUExecutionProvider"])
    length = tokens.shape[1]
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones((1, length), np.int64),
             "position_ids": np.arange(length)[None]}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            kind = np.float16 if "float16" in entry.type else np.float32
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), kind)
    names = {entry.name for entry in session.get_inputs()}
    return session.run(["logits"], {name: feed for name, feed in feeds.items() if name in names})[0][0]


def torch_logits(checkpoint, tokens) -> np.ndarray:
    """What the checkpoint's decoded weights give in torch, online rotations included."""
    return TorchBackend(checkpoint).logits(tokens[0].numpy())


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_computes_what_the_checkpoint_says(case, model, tmp_path):
    text = write_text(tmp_path / "text.txt")
    checkpoint = pipeline.quantize(model(case), tmp_path / "c", format="onnx", rotation="hadamard", rotate="r2",
                                   calibration=str(text), nsamples=4, seqlen=32)
    pipeline.export(checkpoint, tmp_path / "package")
    tokens = random_tokens(1, 24)
    found = onnx_logits(tmp_path / "package", tokens)
    worst, _ = spread(found, torch_logits(checkpoint, tokens))
    assert worst < 1e-4
    _, lost = spread(found, original_logits(model(case), tokens))
    assert 0.01 < lost < 0.6  # quantised, and still the model


@pytest.mark.parametrize("rotate", ["r1,r2", "r1,r2,r4", "r1,r2,r3,r4", "r3"])
@pytest.mark.parametrize("case", ["llama_bias", "smollm2", "mistral_window", "qwen2", "qwen3_tied"])
def test_online_rotations_are_in_the_graph(case, rotate, model, tmp_path):
    """Stock onnxruntime runs R3 and R4, and a tied head stays tied through a matrix."""
    checkpoint = pipeline.quantize(model(case), tmp_path / "c", bits=8, rotate=rotate, r4_block=32,
                                   **RTN | {"rotation": "hadamard"})
    pipeline.export(checkpoint, tmp_path / "package")
    config, tied = json.loads((tmp_path / "package/config.json").read_text()), case != "mistral_window"
    assert config["tie_word_embeddings"] == tied and config["optrot"]["head_mix"] == (tied and "r1" in rotate)
    nodes = {node.name: node for node in onnx.load(graph_of(tmp_path / "package"), load_external_data=False).graph.node}
    assert ("/model/layers.0/mlp/down_proj/R4/Right" in nodes) == ("r4" in rotate)
    assert ("/model/layers.1/attn/k_rotary/R3/Right" in nodes) == ("r3" in rotate)
    assert ("/lm_head/mix/MatMul" in nodes) == config["optrot"]["head_mix"]
    tokens = random_tokens(1, 24)
    found = onnx_logits(tmp_path / "package", tokens)
    worst, _ = spread(found, torch_logits(checkpoint, tokens))
    assert worst < 1e-4
    _, lost = spread(found, original_logits(model(case), tokens))
    assert lost < 0.1  # 8 bits


@pytest.mark.parametrize("options, joined", [({}, [0, 1]), ({"tensor_type": ["layers.0.v_proj=8bit-g32"]}, [1]),
                                             ({"execution_provider": "dml", "dtype": "float16"}, []),
                                             ({"rotate": "r3", "rotation": "hadamard"}, [])])
def test_queries_keys_and_values_are_one_product(options, joined, model, tmp_path):
    """Where their types allow it; DirectML and R3 want them apart."""
    pipeline.export(model("llama_bias"), tmp_path / "package", **RTN | options)
    nodes = {node.name for node in onnx.load(graph_of(tmp_path / "package"), load_external_data=False).graph.node}
    for index in (0, 1):
        attention = f"/model/layers.{index}/attn"
        assert (f"{attention}/qkv_proj/MatMulNBits" in nodes) == (index in joined)
        assert (f"{attention}/k_proj/MatMulNBits" in nodes) == (index not in joined)


@pytest.mark.parametrize("block", [64, 128, 256, 512])
def test_blocks_of_r4(block, model, tmp_path):
    """Large blocks go through two small matrices."""
    checkpoint = pipeline.quantize(model("wide"), tmp_path / "c", bits=8, rotate="r4", r4_block=block,
                                   **RTN | {"rotation": "hadamard"})
    pipeline.export(checkpoint, tmp_path / "package")
    nodes = {node.name for node in onnx.load(graph_of(tmp_path / "package"), load_external_data=False).graph.node}
    assert ("/model/layers.0/mlp/down_proj/R4/Left" in nodes) == (block > 128)
    tokens = random_tokens(1, 24)
    worst, _ = spread(onnx_logits(tmp_path / "package", tokens), torch_logits(checkpoint, tokens))
    assert worst < 1e-4


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32])
def test_every_grid(bits, symmetric, group_size, model, tmp_path):
    checkpoint = pipeline.quantize(model("smollm2"), tmp_path / "c", bits=bits, group_size=group_size,
                                   symmetric=symmetric, head_type=f"{bits}bit", **RTN)
    summary = pipeline.export(checkpoint, tmp_path / "package")
    tokens = random_tokens(1, 24)
    worst, _ = spread(onnx_logits(tmp_path / "package", tokens), torch_logits(checkpoint, tokens))
    assert worst < 1e-4
    offsets = 0 if symmetric else bits
    vectors = 5 * 96 * 32 / summary["weights"]
    assert summary["bits_per_weight"] == pytest.approx(bits + (32 + offsets) / group_size + vectors, abs=0.1)


@pytest.mark.parametrize("case", ["smollm2", "llama"])
def test_embeddings_for_every_build(case, model, tmp_path):
    """CPUs, and so WebAssembly, need no operator for them that some builds lack; `inspect` knows their size anyway."""
    checkpoint = pipeline.quantize(model(case), tmp_path / "c", dtype="float32", **RTN)
    for provider in ("cpu", "webgpu"):
        summary = pipeline.export(checkpoint, tmp_path / provider, execution_provider=provider)
        nodes = onnx.load(graph_of(tmp_path / provider), load_external_data=False).graph.node
        assert any(node.op_type == "GatherBlockQuantized" for node in nodes) == (provider == "webgpu")
        stored = OnnxFolder(tmp_path / provider).tensors.values()
        assert sum(tensor.weights for tensor in stored) == summary["weights"]
        bits = sum(tensor.bits for tensor in stored if tensor.kind != "tables")
        assert bits == round(summary["weights"] * summary["bits_per_weight"])


@pytest.mark.parametrize("head", ["f32", "8bit-g16-sym"])
def test_float_matrices(head, model, tmp_path):
    """A tied float matrix is stored once, an untied one beside a quantised embedding too."""
    for case, embedding in (("smollm2", None), ("llama", "8bit"), ("qwen2_untied", "f32")):
        work = tmp_path / f"{case}"
        checkpoint = pipeline.quantize(model(case), work / "c", head_type=head, embedding_type=embedding,
                                       tensor_type=["o_proj=f32"], **RTN)
        summary = pipeline.export(checkpoint, work / "package")
        tokens = random_tokens(1, 24)
        worst, _ = spread(onnx_logits(work / "package", tokens), torch_logits(checkpoint, tokens))
        assert worst < 1e-4
        data = graph_of(work / "package").with_suffix(".onnx_data").stat().st_size
        assert data < 1.2 * summary["bits_per_weight"] * summary["weights"] / 8 + 70_000  # and tables of RoPE


def test_half_precision(model, tmp_path):
    """A package for WebGPU, which this onnxruntime runs on the CPU, its attention in float16 too."""
    checkpoint = pipeline.quantize(model("llama"), tmp_path / "c", dtype="float16", **RTN)
    pipeline.export(checkpoint, tmp_path / "package", execution_provider="webgpu")
    assert graph_of(tmp_path / "package").name == "model_q4f16.onnx"
    genai = json.loads((tmp_path / "package/genai_config.json").read_text())
    assert "webgpu" in genai["model"]["decoder"]["session_options"]["provider_options"][0]
    tokens = random_tokens(1, 24)
    found = onnx_logits(tmp_path / "package", tokens)
    assert found.dtype == np.float16
    worst, _ = spread(found.astype(np.float32), torch_logits(checkpoint, tokens))
    assert worst < 0.03


def test_accuracy_level(checkpoint, tmp_path):
    """Level 4 rounds activations, in every MatMulNBits."""
    tokens, expected = random_tokens(1, 24), None
    for level in (0, 4):
        pipeline.export(checkpoint, tmp_path / f"{level}", accuracy_level=level)
        nodes = onnx.load(graph_of(tmp_path / f"{level}"), load_external_data=False).graph.node
        levels = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"}
        assert levels == {level}
        found = onnx_logits(tmp_path / f"{level}", tokens)
        expected = torch_logits(checkpoint, tokens) if expected is None else expected
        worst, _ = spread(found, expected)
        assert worst < 1e-4 if level == 0 else 1e-4 < worst < 0.5


def test_the_graph_is_sound(checkpoint, tmp_path):
    """onnx's checker and strict shape inference pass, with the head dimension and all names as transformers.js wants
    them; and they find what is wrong."""
    pipeline.export(checkpoint, tmp_path / "package")
    path = graph_of(tmp_path / "package")
    check_graph(path)
    model = onnx.load(path, load_external_data=False)
    cache = next(entry for entry in model.graph.input if entry.name == "past_key_values.0.key")
    assert cache.type.tensor_type.shape.dim[3].dim_value == 16
    assert {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
            if entry.key == "location"} == {"model_q4.onnx_data"}
    config = json.loads((tmp_path / "package/config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_q4.onnx": 1}
    reshape = next(node for node in model.graph.node if node.op_type == "Reshape")
    reshape.op_type = "Reshapes"
    onnx.save(model, path)
    with pytest.raises(RuntimeError, match="not valid ONNX"):
        check_graph(path)


def test_genai_generates(model, tmp_path):
    """onnxruntime-genai loads the folder and continues a text as onnxruntime's logits say."""
    import onnxruntime_genai as genai

    pipeline.export(model("smollm2"), tmp_path / "package", **RTN | {"bits": 8, "rotation": "hadamard"})
    loaded = genai.Model(str(tmp_path / "package"))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    tokens = random_tokens(1, 12)
    generator.append_tokens(tokens[0].numpy().astype(np.int32))
    for _ in range(6):
        generator.generate_next_token()
    found = list(generator.get_sequence(0))
    for length in range(12, len(found)):
        assert found[length] == onnx_logits(tmp_path / "package", tokens.new_tensor([found[:length]]))[-1].argmax()


def test_from_gguf(model, tmp_path):
    """A GGUF becomes a package with a Hugging Face tokenizer."""
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", type="f32", embedding_type="f32", head_type="f32",
                    **RTN | {"format": "gguf"})
    pipeline.export(tmp_path / "m.gguf", tmp_path / "package", bits=8, **RTN)
    assert (tmp_path / "package/tokenizer.json").is_file()
    tokens = random_tokens(1, 24)
    _, lost = spread(onnx_logits(tmp_path / "package", tokens), original_logits(model("smollm2"), tokens))
    assert lost < 0.2


@pytest.mark.parametrize("options, says", [
    (["--bits", "3"], "--bits 3: ONNX stores 2, 4, 8"),
    (["--group-size", "48"], "--group-size 48: ONNX stores groups of 16, 32, 64, 128, 256"),
    (["--group-size", "64"], "rows of 96 weights do not divide into int4-g64-zero's groups of 64"),
    (["--execution-provider", "npu"], "--execution-provider npu: use cpu, cuda, dml, webgpu"),
    (["--execution-provider", "cuda", "--dtype", "float32"], "cuda computes in float16"),
    (["--accuracy-level", "2"], "--accuracy-level 2: use 0"),
    (["--dtype", "bfloat16"], "--dtype bfloat16: use float32, float16"),
    (["--head-type", "q8_0"], "q8_0: ONNX stores 2bit, 4bit, 8bit"),
    (["--rotation", "hadamard", "--rotate", "r4"], "R4 block 256 must be a power of two that divides 160"),
    (["--vocab-from", "x.gguf"], "--vocab-from is for GGUF"),
    (["--format", "mlx", "--symmetric"], "--symmetric and --no-symmetric are for --format onnx and gptq"),
    (["--format", "gguf", "--accuracy-level", "4"], "--accuracy-level is for --format onnx"),
])
def test_bad_input_is_refused(options, says, model, tmp_path, capfd):
    refused(capfd, "export", model("llama"), "--format", "onnx", "--out", tmp_path / "package", *options, says=says)
    assert left(tmp_path) == []


def test_missing_libraries_are_named(model, tmp_path):
    """Without onnxruntime-genai the export is refused before it begins, with the extra to install."""
    code = ("import sys; sys.modules['onnxruntime_genai'] = None; from optrot_edge.cli import main; "
            f"main(['export', {str(model('llama'))!r}, '--format', 'onnx', '--out', {str(tmp_path / 'p')!r}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "optrot-edge[onnx]" in done.stderr
    assert left(tmp_path) == []


def test_legacy_gguf_grids_are_matmulnbits_own(model, tmp_path):
    """Q4_0 and Q8_0 are symmetric blocks of 32 with float16 scales: their checkpoints become float16 packages."""
    checkpoint = pipeline.quantize(model("llama"), tmp_path / "c", **RTN | {"format": "gguf"})
    pipeline.export(checkpoint, tmp_path / "package", format="onnx", execution_provider="webgpu")
    tokens = random_tokens(1, 24)
    worst, _ = spread(onnx_logits(tmp_path / "package", tokens).astype(np.float32), torch_logits(checkpoint, tokens))
    assert worst < 0.03


def test_checkpoints_for_other_formats_are_refused(model, tmp_path, capfd):
    pipeline.quantize(model("llama"), tmp_path / "c", type="q4_1", **RTN | {"format": "gguf"})
    refused(capfd, "export", tmp_path / "c", "--format", "onnx", "--out", tmp_path / "package",
            says="is on grid q4_1, which ONNX's MatMulNBits lacks")
    pipeline.quantize(model("llama"), tmp_path / "o", **RTN)
    refused(capfd, "export", tmp_path / "o", "--execution-provider", "dml", "--out", tmp_path / "package",
            says="computes in float16, and this package is float32")
    assert left(tmp_path) == ["c", "o"]


def test_only_packages_are_replaced(checkpoint, tmp_path, capfd):
    only_packages_are_replaced(checkpoint, tmp_path, capfd, "onnx")


def test_nothing_is_left_of_a_failure(checkpoint, tmp_path):
    nothing_is_left_of_a_failure(checkpoint, tmp_path, export_onnx)


@pytest.mark.parametrize("of", ["q", "qkv"])
def test_biases_of_zero(of, model, copied, tmp_path):
    """The builder draws no node for them; the package is whole all the same."""
    folder = copied(model("llama_bias"))
    weights = load_file(folder / "model.safetensors")
    biases = [name for name in weights if name.endswith(tuple(f"{letter}_proj.bias" for letter in of))]
    assert biases
    save_file(weights | {name: np.zeros_like(weights[name]) for name in biases}, folder / "model.safetensors",
              metadata={"format": "pt"})
    checkpoint = pipeline.quantize(folder, tmp_path / "c", **RTN)
    pipeline.export(checkpoint, tmp_path / "package")
    tokens = random_tokens(1, 24)
    worst, _ = spread(onnx_logits(tmp_path / "package", tokens), torch_logits(checkpoint, tokens))
    assert worst < 1e-4


def test_weights_beyond_half_precision(model, copied, tmp_path):
    """A gain that float16 cannot hold is refused by name, not stored as infinity."""
    folder = copied(model("llama"))
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.input_layernorm.weight"
    save_file(weights | {name: weights[name] * np.float32(1e6)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(InputError, match="layers.1.attn_norm.weight has weights beyond float16's range; choose"):
        pipeline.export(folder, tmp_path / "package", execution_provider="webgpu", **RTN)
    assert not (tmp_path / "package").exists()


def test_damage_is_seen_when_read_back(checkpoint, tmp_path):
    """A bit that changes on the disk between writing and reading is found."""
    def damage(done, total, what):
        if what.startswith("wrote") and not touched:
            touched.append(what)
        elif done >= total / 2 and len(touched) == 1:
            data, = (tmp_path / "package.partial").glob("onnx/*.onnx_data")
            raw = bytearray(data.read_bytes())
            raw[-1] ^= 1
            data.write_bytes(raw)
            touched.append(what)

    touched: list[str] = []
    with pytest.raises(RuntimeError, match="read back differently"):
        export_onnx(QuantizedCheckpoint(checkpoint), tmp_path / "package", progress=damage)
    assert left(tmp_path) == ["c"]


def test_a_size_is_met(model, tmp_path):
    text = write_text(tmp_path / "text.txt")
    size = 300_000
    summary = pipeline.export(model("llama"), tmp_path / "package", format="onnx", rotation="none",
                              calibration=str(text), nsamples=8, seqlen=32, target_size=size)
    assert 0.7 * size < summary["bytes"] <= size
    bits = {attribute.i for node in onnx.load(graph_of(tmp_path / "package"), load_external_data=False).graph.node
            for attribute in node.attribute if attribute.name == "bits"}
    assert len(bits) > 1


def test_the_plan_is_what_is_written(model, tmp_path):
    options = RTN | {"rotation": "hadamard", "group_size": 16}  # an even number of zero-points: no half bytes
    planned = pipeline.plan(model("qwen2"), packaged=True, **options)
    pipeline.quantize(model("qwen2"), tmp_path / "c", **options)
    again = pipeline.plan(tmp_path / "c", packaged=True)
    summary = pipeline.export(tmp_path / "c", tmp_path / "package")
    assert planned["bytes"] == again["bytes"] == round(summary["bits_per_weight"] * summary["weights"] / 8)
    assert not planned["unties_head"]


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("one", "two"):
        pipeline.export(checkpoint, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
