"""Types by name: llama.cpp's mixes as llama.cpp itself deals them out, and overrides by pattern."""

from __future__ import annotations

import dataclasses
import json

import gguf
import llama_cpp
import numpy as np
import pytest

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.gridspec import fitting_type
from optrot_edge.models import open_model
from optrot_edge.recipe import Recipe
from optrot_edge.tensor_types import PRESETS, all_shapes, tensor_types
from tests.cli_runner import RTN, refused, run_ok
from tests.exporters.test_gguf import check_logits
from tests.road import FAST_OPTIONS, save_model


def write_model(path, layers: int, heads: int, kv_heads: int, hidden: int, *, tied: bool, arch: str = "llama"):
    """A GGUF of random F16 matrices that llama.cpp can load."""
    rng, vocab, head_dim = np.random.default_rng(0), 32, hidden // heads
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {"block_count": layers, "embedding_length": hidden, "context_length": 64,
                       "feed_forward_length": 256, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
                       "rope.dimension_count": head_dim}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["t 1"])
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,)} | ({} if tied else {"output": (vocab, hidden)})
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_output": (hidden, hidden),
            "attn_k": (kv_heads * head_dim, hidden), "attn_v": (kv_heads * head_dim, hidden),
            "ffn_gate": (256, hidden), "ffn_up": (256, hidden), "ffn_down": (hidden, 256)}.items()}
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def types_of(path) -> dict[str, str]:
    """Types of a GGUF's matrices."""
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1}


@pytest.mark.slow
@pytest.mark.parametrize("model", [
    {"layers": 17, "heads": 4, "kv_heads": 2, "hidden": 256, "tied": False},
    {"layers": 9, "heads": 4, "kv_heads": 1, "hidden": 256, "tied": True},
    {"layers": 8, "heads": 3, "kv_heads": 3, "hidden": 288, "tied": False},
    {"layers": 80, "heads": 4, "kv_heads": 2, "hidden": 256, "tied": False}])
def test_mixes_are_llama_cpps(model, tmp_path):
    """Every tensor's type, fallbacks included, against `llama_model_quantize`; only the mixes that differ at 80."""
    path = write_model(tmp_path / "m.gguf", **model)
    source = open_model(path)
    for preset in ("q3_k_m", "q4_k_m") if model["layers"] == 80 else PRESETS:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{preset.upper()}"), 2
        out = tmp_path / f"{preset}.gguf"
        assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params) == 0
        ours = tensor_types(source.family, source.config, Recipe(type=preset, rotation="none"))
        shapes = all_shapes(source.family, source.config)
        assert {source.family.gguf_name(name): fitting_type(kind, shapes[name][-1])
                for name, kind in ours.items()} == types_of(out), preset
        out.unlink()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(save_model(tmp_path_factory.mktemp("types") / "model", "tinyllama"))


def test_overrides_go_first_and_in_order(source):
    recipe = Recipe(type="q4_1", head_type="q6_k", rotation="none",
                    tensor_type=["ffn_down=Q8_0", r"blk\.[01]\.=q5_0", r"layers\.2\.[qk]_proj=q5_1", "^output=f16"])
    types = tensor_types(source.family, source.config, recipe)
    assert types["layers.0.down_proj.weight"] == types["layers.2.down_proj.weight"] == "q8_0"
    assert {types[f"layers.{i}.{name}_proj.weight"] for i in (0, 1) for name in "qkvo"} == {"q5_0"}
    assert [types[f"layers.2.{name}_proj.weight"] for name in "qkvo"] == ["q5_1", "q5_1", "q4_1", "q4_1"]
    assert types["lm_head.weight"] == "f16" and types["embed_tokens.weight"] == "q4_1"


@pytest.mark.parametrize(("entry", "says"), [
    ("ffn_down", "PATTERN=TYPE"), ("=q4_0", "PATTERN=TYPE"), ("ffn_down=q4_9", "unknown grid 'q4_9'"),
    ("(=q4_0", "no regular expression")])
def test_bad_overrides(entry, says):
    with pytest.raises(InputError, match=says):
        Recipe(rotation="none", tensor_type=[entry])


def test_an_override_that_matches_nothing(source):
    with pytest.raises(InputError, match="ffn_dwn=q8_0: no matrix of this model"):
        tensor_types(source.family, source.config, Recipe(rotation="none", tensor_type=["ffn_dwn=q8_0"]))
    with pytest.raises(InputError, match="no matrix of this model is left"):  # an earlier one took them all
        tensor_types(source.family, source.config, Recipe(rotation="none", tensor_type=["ffn=q8_0", "ffn_up=q4_0"]))
    with pytest.raises(InputError, match="'ffn_down' is given twice"):
        Recipe(tensor_type=["ffn_down=q6_k", "ffn_down=q8_0"])


def test_unknown_types_name_the_mixes():
    with pytest.raises(InputError, match="q4_k_m"):
        Recipe(type="q4_k_x")


def test_a_mix_and_overrides_reach_llama_cpp(tmp_path, capfd):
    """From the command line to a verified GGUF whose types are those of the dry run, by GPTQ."""
    model = save_model(tmp_path / "model", "wide")
    options = ["--type", "q4_k_m", "--tensor-type", "attn_k=q8_0", "--tensor-type", "ffn_up=f16", "--rotation", "none",
               *FAST_OPTIONS]
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--dry-run", "--json", *options)
    plan = json.loads(capfd.readouterr().out)
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--checkpoint", tmp_path / "c", "-q", *options)
    types = types_of(tmp_path / "m.gguf")
    assert types == {"token_embd.weight": "q4_k", "output.weight": "q6_k", "blk.0.attn_q.weight": "q4_k",
                     "blk.0.attn_k.weight": "q8_0", "blk.0.attn_v.weight": "q6_k", "blk.0.attn_output.weight": "q4_k",
                     "blk.0.ffn_gate.weight": "q4_k", "blk.0.ffn_up.weight": "f16", "blk.0.ffn_down.weight": "q6_k"}
    assert plan["bytes"] == sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert plan["types"]["body"].split(", ")[0] == "q4_k" and plan["types"]["head"] == "q6_k"
    largest, spread = check_logits(QuantizedCheckpoint(tmp_path / "c"), tmp_path / "m.gguf")
    assert spread < 0.03 and largest < 0.2


def test_refusals_from_the_command_line(tmp_path, capfd):
    model = save_model(tmp_path / "model", "llama")
    refused(capfd, "export", model, "--out", tmp_path / "m.gguf", *RTN, "--tensor-type", "ffn=mlx-4bit-g32",
            says="--tensor-type mlx-4bit-g32: GGUF stores")
    refused(capfd, "export", model, "--out", tmp_path / "m.gguf", *RTN, "--type", "q4_0", "--target-bpw", 5,
            says="give one of them")


def test_a_recipe_can_be_replaced():
    """Arms of `auto` are copies of the recipe with another rotation."""
    recipe = Recipe(type="q4_k_m", tensor_type=["v=q8_0"], rotation="none")
    assert dataclasses.replace(recipe, rotation="hadamard").tensor_type == ["v=q8_0"]
