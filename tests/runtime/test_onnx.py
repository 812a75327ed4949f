"""The ONNX backend on folders that onnxruntime-genai's builder made, against transformers and genai itself."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from optrot_edge.errors import InputError
from optrot_edge.runtime.onnx import OnnxBackend
from tests.onnx_models import as_exported, build, edit_genai, edit_graph
from tests.runtime.byte_llama import TEXT
from tests.tiny_models import random_tokens, reference_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")
TOKENS = random_tokens(2, 40).numpy()


def transformers_logits(folder, tokens=TOKENS):
    with torch.no_grad():
        return reference_model(folder)(torch.from_numpy(tokens)).logits.numpy()


def logits(folder, tokens=TOKENS, **options):
    with OnnxBackend(folder, **options) as backend:
        return backend.logits_batch(tokens)


def greedy(backend, prompt, count):
    """The loop over `logits` that generation must agree with."""
    found = []
    while len(found) < count:
        found.append(int(backend.logits([*prompt, *found])[-1].argmax()))
    return found


@pytest.mark.parametrize("case", ["llama", "llama3_rope", "llama_bias", "smollm2", "mistral", "qwen2", "qwen2_untied",
                                  "qwen3", "qwen3_tied"])
def test_logits_equal_transformers(genai, case):
    source, folder = genai(case)
    got = logits(folder)
    assert got.dtype == np.float32 and got.shape == (2, 40, 512)
    np.testing.assert_allclose(got, transformers_logits(source), atol=2e-5)


def decoded(source, folder, out):
    """The float model `source` with the 4-bit codes less 8, times scales, that `folder` stores."""
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
    weights = load_file(source / "model.safetensors")
    for name, codes in stored.items():
        if not name.endswith("weight_Q4"):
            continue
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1).astype(np.float32) - 8
        matrix = (nibbles * stored[name.replace("_Q4", "_scales")][..., None]).reshape(codes.shape[0], -1)
        path = name.replace(".MatMul.weight_Q4", "").replace(".attn.", ".self_attn.")
        targets = [path.replace("qkv", part) for part in "qkv"] if "qkv" in path else [path]
        for target in targets:
            rows = len(weights[f"{target}.weight"])
            weights[f"{target}.weight"], matrix = matrix[:rows], matrix[rows:]
        assert not len(matrix)
    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def test_quantised_logits_equal_torch_on_dequantised_weights(genai, tmp_path):
    """In float32: accuracy level 4, the stored one, rounds activations."""
    source, folder = genai("llama", "int4")
    expected = transformers_logits(decoded(source, folder, tmp_path / "decoded"))
    np.testing.assert_allclose(logits(folder, accuracy_level=0), expected, atol=2e-5)
    assert 0.005 < np.abs(logits(folder) - expected).max() < 0.3
    assert np.abs(transformers_logits(source) - expected).max() > 0.3


def test_windows_do_not_see_each_other(genai):
    """Nor does it matter how many steps a window takes."""
    folder = genai("llama", "int4")[1]
    with OnnxBackend(folder) as whole, OnnxBackend(folder, n_batch=7) as parts:
        expected = whole.logits_batch(TOKENS)
        assert [len(part) for part in parts._graph().steps(TOKENS[0], 7)] == [7] * 5 + [5]
        np.testing.assert_allclose(parts.logits_batch(TOKENS), expected, atol=1e-5)
        np.testing.assert_array_equal(whole.logits(TOKENS[1]), expected[1])


def test_the_exporters_layout(genai, tmp_path):
    """A graph in a folder of its own, as it is and with its level edited; nothing is written into the package."""
    source, folder = genai("llama", "int4")
    package = as_exported(folder, tmp_path / "package")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for level in (None, 0):
        np.testing.assert_array_equal(logits(package, accuracy_level=level), logits(folder, accuracy_level=level))
        with OnnxBackend(package, accuracy_level=level) as backend:
            assert backend.generate(TOKENS[0], 12) == greedy(backend, TOKENS[0], 12)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_accuracy_levels(genai):
    folder, zero = genai("llama", "int4")[1], genai("llama", "int4", accuracy_level=0)[1]
    with OnnxBackend(folder) as stored, OnnxBackend(folder, accuracy_level=0) as edited, OnnxBackend(zero) as built:
        assert (stored.accuracy_level, edited.accuracy_level, built.accuracy_level) == (4, 0, 0)
        assert "4-bit g32, accuracy level 0" in edited.name
        np.testing.assert_array_equal(edited.logits_batch(TOKENS), built.logits_batch(TOKENS))
        np.testing.assert_array_equal(logits(folder, accuracy_level=4), stored.logits_batch(TOKENS))
        np.testing.assert_array_equal(logits(zero, accuracy_level=4), stored.logits_batch(TOKENS))
        prompts, answers = random_tokens(12, 6, seed=3).numpy(), []
        for backend in (stored, edited):  # generation runs the level too: two of them differ somewhere
            answers.append([backend.generate(prompt, 16) for prompt in prompts])
            assert answers[-1][0] == greedy(backend, prompts[0], 16)[:len(answers[-1][0])]
        assert answers[0] != answers[1]
        assert [built.generate(prompt, 16) for prompt in prompts] == answers[1]


def test_float16_graphs(genai, tmp_path):
    """Made for a GPU, run on the CPU: the cache is float16."""
    source, folder = genai("llama", "int4", "cuda")
    with OnnxBackend(folder, n_batch=7) as backend:
        got = backend.logits_batch(TOKENS)
        assert backend.generate(TOKENS[0], 8) == greedy(backend, TOKENS[0], 8)
    expected = transformers_logits(decoded(source, folder, tmp_path / "decoded"))
    assert got.dtype == np.float32 and 0 < np.abs(got - expected).max() < 0.03


def test_graphs_with_position_ids(genai):
    """The builder's float16 for a CPU: it cannot read several tokens after others, and stops onnxruntime-genai."""
    source, folder = genai("llama", "fp16")
    assert "position_ids" in (folder / "genai_config.json").read_text()
    got = logits(folder, n_batch=7)
    assert 0 < np.abs(got - transformers_logits(source)).max() < 0.03
    with OnnxBackend(folder) as backend:
        with pytest.raises(InputError, match="onnxruntime-genai cannot run it"):
            backend.generate(TOKENS[0], 3)
        with pytest.warns(UserWarning, match="no speed: .*cannot run it"):
            assert set(backend.speed(16, 2).values()) == {None}
        np.testing.assert_array_equal(backend.logits_batch(TOKENS), got)


def test_rope_outside_of_attention(genai, tmp_path, monkeypatch):
    """Such a graph, R3's for one, takes position ids, also of later steps."""
    from onnxruntime_genai.models import builder

    monkeypatch.setattr(builder.Model, "is_fused_rope_supported", lambda model: False)
    source = genai("llama")[0]
    folder = build(source, tmp_path / "onnx", fuse_qkv="false")
    assert "position_ids" in (folder / "genai_config.json").read_text()
    with OnnxBackend(folder, n_batch=7) as backend:
        np.testing.assert_allclose(backend.logits_batch(TOKENS), transformers_logits(source), atol=2e-5)
        assert backend.generate(TOKENS[0], 8) == greedy(backend, TOKENS[0], 8)


def test_graphs_that_keep_the_last_logits_only(genai):
    """In float: a last bit more or less in one path's activations may round to another int8."""
    folders = genai("llama", "int4", prune_lm_head="true")[1], genai("llama", "int4")[1]
    np.testing.assert_allclose(*(logits(folder, accuracy_level=0) for folder in folders), atol=1e-5)


@pytest.mark.parametrize("windowed", ["true", "false"])
def test_a_window_that_the_graph_lacks_is_told(genai, copied, windowed):
    """The builder's Mistral with a sliding window: right within it, wrong beyond."""
    source, folder = genai("mistral_window", windowed_kv_cache=windowed)
    folder = copied(folder)
    (folder / "config.json").write_text((source / "config.json").read_text())
    with pytest.warns(UserWarning, match="has no window, though the package states one of 8"):
        error = np.abs(logits(folder) - transformers_logits(source)).max((0, 2))
    assert error[:8].max() < 2e-5 and error[8:].min() > 0.1

    def narrow(model):
        for node in model.graph.node:
            for entry in node.attribute:
                if entry.name == "local_window_size":
                    entry.i = 8

    edit_graph(folder, narrow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(logits(folder, n_batch=7), transformers_logits(source), atol=2e-5)


def test_generation_is_greedy_whatever_the_package_asks_for(genai, copied):
    folder = genai("smollm2")[1]
    wilful = edit_genai(copied(folder), "search", do_sample=True, temperature=9.0, top_k=200, repetition_penalty=4.0,
                        no_repeat_ngram_size=2, min_length=30, num_beams=3)
    with OnnxBackend(folder) as backend, OnnxBackend(wilful) as other:
        expected = greedy(backend, TOKENS[0], 20)
        assert backend.generate(TOKENS[0], 20) == expected == other.generate(TOKENS[0], 20)
        assert len(set(expected)) < 20  # a penalty would have changed that
        assert backend.generate(TOKENS[0], 0) == []
    stop = edit_genai(copied(folder), eos_token_id=[2, expected[4]])
    with OnnxBackend(stop) as backend:
        assert backend.generate(TOKENS[0], 20) == expected[:expected.index(expected[4])]


def test_chat_goes_through_the_template(genai, copied):
    folder = copied(genai("smollm2")[1])
    with OnnxBackend(folder) as backend:
        prompt = backend.tokenize("<|im_start|>user\nHi there<|im_end|>\n", add_bos=False, special=True)
        expected = backend.detokenize(backend.generate(prompt, 12), special=False).strip()
        assert expected and backend.chat("Hi there", 12) == expected
    (folder / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    with OnnxBackend(folder) as backend, pytest.raises(InputError, match="chat template fails"):
        backend.chat("Hi")
    (folder / "chat_template.jinja").unlink()
    with OnnxBackend(folder) as backend, pytest.raises(InputError, match="no chat template"):
        backend.chat("Hi")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with OnnxBackend(folder) as backend:
        prompt = backend.tokenize("Hi there", add_bos=False)
        assert backend.chat("Hi there", 9) == backend.detokenize(backend.generate(prompt, 9), special=False).strip()
    (folder / "tokenizer_config.json").write_text("{")
    with OnnxBackend(folder) as backend, pytest.raises(InputError, match="tokenizer_config.json"):
        backend.chat("Hi")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Unheard"}))
    with OnnxBackend(folder) as backend, pytest.raises(InputError, match="cannot load its tokenizer"):
        backend.chat("Hi")
    (folder / "tokenizer.json").write_text("{}")
    with OnnxBackend(folder) as backend:
        assert backend.logits([1]).shape == (1, 512)  # needs no tokenizer
        for ask in (backend.chat, backend.tokenize):
            with pytest.raises(InputError, match="tokenizer.json"):
                ask("Hi")


def test_tokens_and_bos(genai):
    with OnnxBackend(genai("llama3_rope")[1]) as backend:
        assert (backend.vocab_size, backend.context_length, backend.bos, backend.adds_bos) == (512, 256, 507, True)
        ids = backend.tokenize(TEXT, add_bos=False)
        assert backend.detokenize(ids) == TEXT and backend.tokenize(TEXT) == [507, *ids]
        assert backend.tokenize("<|eot_id|>", add_bos=False, special=True) == [511]
        with pytest.raises(InputError, match="token ids"):
            backend.detokenize([512])
    with OnnxBackend(genai("qwen2")[1]) as backend:
        assert not backend.adds_bos
        with pytest.raises(InputError, match="no beginning-of-sequence"):
            backend.tokenize("a", add_bos=True)


def test_speed(genai):
    with OnnxBackend(genai("llama", "int4")[1]) as backend:
        speed = backend.speed(prompt_tokens=64, decode_tokens=8)
        assert speed.keys() == {"prefill_tokens_per_s", "decode_tokens_per_s"}
        assert all(1 < value < 1e8 for value in speed.values())
        speed = backend.speed(prompt_tokens=1000, decode_tokens=1000)  # cut to the context
        assert all(1 < value < 1e8 for value in speed.values())


def test_close_twice(genai):
    import onnxruntime
    import onnxruntime_genai

    backend = OnnxBackend(genai("llama")[1])
    assert backend.version == f"{onnxruntime.__version__}, genai {onnxruntime_genai.__version__}"
    backend.close()
    backend.close()
