"""Hugging Face reader: config formats, laziness, tokenizer files, bad folders."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from tests.tiny_models import CASES, TOKENIZER_KINDS, random_tokens, save_tiny, save_tiny_tokenizer


@pytest.fixture
def copy(tiny, tmp_path):
    """`copy(case, shards)`: a tiny model's folder that a test may damage."""
    return lambda case="llama", shards=False: shutil.copytree(tiny(case, shards), tmp_path / "model")


def edit(folder, remove=(), **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_config_format_of_transformers_4(tiny, copy, case):
    new = open_model(tiny(case)).config
    folder = copy(case)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    if case == "llama_linear_rope":  # the oldest spelling
        rope = {"type": rope["rope_type"], "factor": rope["factor"]}
    scaling = None if rope.get("rope_type") == "default" else rope
    edit(folder, remove=["rope_parameters", "dtype"], rope_theta=theta, rope_scaling=scaling)
    old = open_model(folder).config
    assert old.to_dict() | {"name": ""} == new.to_dict() | {"name": ""}
    assert (old.rope_scaling is None) == (case not in ("llama3_rope", "llama_linear_rope"))


def test_config_defaults(copy):
    folder = edit(copy(), remove=["head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_parameters",
                                  "rms_norm_eps"])
    with pytest.raises(InputError, match="k_proj.weight is"):  # no num_key_value_heads means all heads
        open_model(folder)
    config = open_model(edit(folder, num_key_value_heads=2, eos_token_id=[2, 3])).config
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (16, 10000.0, 1e-6)
    assert config.tie_word_embeddings is False and config.extra["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtypes(tiny, tmp_path, dtype):
    source = open_model(save_tiny(tmp_path / "m", "qwen2", dtype))
    expected = open_model(tiny("qwen2")).layer(0)
    for name, tensor in source.layer(0).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].to(dtype).float())
    assert source.layer(0, torch.float64)["v_proj.bias"].dtype == torch.float64


def test_tensors_are_copies(tiny):
    source = open_model(tiny("llama"))
    source.layer(0)["q_proj.weight"].zero_()
    source.embedding().zero_()
    assert source.layer(0)["q_proj.weight"].std() > 0 and source.embedding().std() > 0


def test_nan_is_found_when_its_layer_is_read(copy):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
        tensors["lm_head.weight"][0, 0] = torch.nan

    source = open_model(edit_tensors(copy(), damage))
    source.layer(0)
    with pytest.raises(InputError, match=r"layers\.1\.up_proj\.weight.*NaN"):
        source.layer(1)
    with pytest.raises(InputError, match="lm_head"):
        source.lm_head()


@pytest.mark.slow
def test_memory_stays_at_one_layer(tmp_path):
    """Reading 200 MB layer by layer raises the peak by less than 60 MB after the first layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=24, vocab_size=256,
                         num_attention_heads=8, num_key_value_heads=8)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    config.save_pretrained(tmp_path / "m")
    save_file({name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in parameters.items()},
              tmp_path / "m" / "model.safetensors")
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 200e6
    code = ("import resource, sys, torch; from optrot_edge.models import open_model\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"source = open_model({str(tmp_path / 'm')!r}); source.layer(0); before = peak()\n"
            "for i in range(24): source.layer(i)\n"
            "print(peak() - before)")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(printed) * unit < 60e6


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_tokenizer_files_are_copied(copy, tmp_path, kind):
    folder, out = save_tiny_tokenizer(copy(), kind), tmp_path / "out"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    files = [path.relative_to(out).as_posix() for path in open_model(folder).save_tokenizer(out)]
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                          "additional_chat_templates/tool_use.jinja", "model_card.gguf"}
    assert sorted(files) == sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    for name in set(files) - {"model_card.gguf"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="tokenizer"):
        open_model(folder).save_tokenizer(tmp_path / "file")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "'gemma2' cannot be rotated"),
    ({"model_type": 3}, "model_type must be a string"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"hidden_size": 128}, "is [512, 96] but the configuration calls for [512, 128]"),
    ({"hidden_size": "96"}, "hidden_size is '96'"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 2**31 - 1}, "model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 1}, "model.layers.1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_attention_heads": 5}, "cannot share"),
    ({"num_attention_heads": 0, "head_dim": None}, "attention heads"),
    ({"num_attention_heads": 7, "head_dim": None}, "does not divide into 7"),
    ({"num_key_value_heads": 3}, "k_proj.weight is"),
    ({"head_dim": 15}, "odd"),
    ({"intermediate_size": True}, "intermediate_size is True"),
    ({"attention_bias": True}, "q_proj.bias is missing"),
    ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"eos_token_id": "two"}, "eos_token_id"),
    ({"rope_parameters": None, "rope_theta": 10**400}, "rope_theta"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope scaling 'longrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling's factor"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
     "must exceed"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": [1]}, "must be objects"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "say different things"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "say different things"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "each kind of layer"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_configs(copy, changes, message):
    folder = edit(copy(), **changes)
    with pytest.raises(InputError) as caught:
        open_model(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rope_scaling_that_repeats_the_parameters(copy, tiny):
    """As folders have it that were made for several versions of transformers."""
    folder = copy("llama_linear_rope")
    factor = json.loads((folder / "config.json").read_text())["rope_parameters"]["factor"]
    for scaling in ({"rope_type": "linear", "factor": factor}, {"type": "linear", "factor": factor}):
        assert open_model(edit(folder, rope_scaling=scaling)).config.rope_scaling["factor"] == factor


def test_sliding_windows_of_qwen(copy):
    folder = edit(copy("qwen3"), remove=["layer_types"], sliding_window=8, use_sliding_window=False)
    assert open_model(folder).config.sliding_window is None
    edit(folder, use_sliding_window=True, max_window_layers=2)
    assert open_model(folder).config.sliding_window is None
    assert open_model(edit(folder, max_window_layers=0)).config.sliding_window == 8
    for mixed in ({"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(InputError, match="some layers only"):
            open_model(edit(folder, **mixed))


def test_tied_models_with_a_stored_head(tiny, copy):
    folder = copy("smollm2")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    source = open_model(folder)
    tokens = random_tokens()
    assert source.lm_head() is None
    assert torch.equal(logits(source, tokens), logits(open_model(tiny("smollm2")), tokens))
    edit_tensors(folder, lambda t: t["lm_head.weight"].mul_(2))
    for read in (lambda source: source.lm_head(), lambda source: source.rows("embed_tokens.weight", 0, 8),
                 lambda source: source.rows("lm_head.weight", 0, 8)):  # whichever matrix is quantised for both
        with pytest.raises(InputError, match="differs from the embedding"):
            read(open_model(folder))


def test_missing_or_damaged_weights(copy, tmp_path):
    folder = copy()
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(InputError, match="truncated or damaged"):
            open_model(folder)
    weights.write_bytes(data)
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(InputError, match="layers.1.mlp.down_proj.weight is missing"):
        open_model(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(96, 160, dtype=torch.int8)}))
    with pytest.raises(InputError, match="dtype I8"):
        open_model(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        open_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read as JSON"):
        open_model(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config\.json cannot be read as JSON"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_model(folder)


def test_damaged_shards(copy):
    folder = copy(shards=True)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name, shard = sorted(index["weight_map"].items())[-1]

    def refused(weight_map, message):
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            open_model(folder)

    weight_map = index["weight_map"]
    refused({key: value for key, value in weight_map.items() if key != name}, "disagree about tensor")
    refused({key: value for key, value in weight_map.items() if value != shard}, "is not in")
    refused(weight_map | {name: "model-00099-of-00099.safetensors"}, "00099.* is missing")
    refused(weight_map | {name: "../model.safetensors"}, "not a file name")
    refused(weight_map | {name: "x" * 5000}, "is missing")
    refused(weight_map | {name: 3}, "not a file name")
    refused([], "weight_map is missing")
    index_path.write_text(json.dumps(index))
    open_model(folder)
    (folder / shard).unlink()
    with pytest.raises(InputError, match=f"{shard} of the index is missing"):
        open_model(folder)


def test_absent_paths_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be downloaded"):
        open_model("no-such-owner-here/no-such-model")
    for path in (tmp_path / "absent", "absent.gguf", "a/b/c", "./x", "", "x" * 5000):
        with pytest.raises(InputError):
            open_model(path)
