"""The MLX backend on folders that the real mlx_lm converted, against transformers and mlx_lm itself."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from optrot_edge.errors import InputError
from optrot_edge.runtime.mlx import MlxBackend
from tests.mlx_models import convert, edit_config
from tests.runtime.byte_llama import TEXT
from tests.runtime.hf_backends import refuses_what_does_not_fit
from tests.tiny_models import random_tokens, reference_model, save_tiny

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.filterwarnings("error:.*rope_parameters")
TOKENS = random_tokens(2, 40).numpy()
QUANTISED = {"quantize": True, "q_bits": 4, "q_group_size": 32}
MIXED = {"quantize": True, "q_group_size": 32, "quant_predicate": "mixed_3_6"}


def transformers_logits(folder, tokens=TOKENS):
    with torch.no_grad():
        return reference_model(folder)(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("case", ["llama", "llama3_rope", "llama_bias", "smollm2", "mistral", "qwen2", "qwen2_untied",
                                  "qwen3", "qwen3_tied"])
def test_logits_equal_transformers(mlx, case):
    source, folder = mlx(case)
    with MlxBackend(folder) as backend:
        got = backend.logits_batch(TOKENS)
    assert got.dtype == np.float32 and got.shape == (2, 40, 512)
    np.testing.assert_allclose(got, transformers_logits(source), atol=2e-5)


def decoded(source, folder, out):
    """The float model `source` with the weights that `folder` stores, through `mx.dequantize`."""
    stated = json.loads((folder / "config.json").read_text())["quantization"]
    arrays, weights = mx.load(str(folder / "model.safetensors")), {}
    for name, array in arrays.items():
        path, _, part = name.rpartition(".")
        if part == "weight" and f"{path}.scales" in arrays:
            grid = stated.get(path, stated)
            array = mx.dequantize(array, arrays[f"{path}.scales"], arrays[f"{path}.biases"],
                                  group_size=grid["group_size"], bits=grid["bits"])
        if part not in ("scales", "biases"):
            weights[name] = np.array(array)
    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [QUANTISED, MIXED], ids=["4-bit", "3 and 6-bit"])
def test_quantised_logits_equal_torch_on_dequantised_weights(mlx, tmp_path, case, options):
    source, folder = mlx(case, **options)
    expected = transformers_logits(decoded(source, folder, tmp_path / "decoded"))
    with MlxBackend(folder) as backend:
        got = backend.logits_batch(TOKENS)
        assert ("4-bit g32" if options is QUANTISED else "3-bit g32, 6-bit g32") in backend.name
    np.testing.assert_allclose(got, expected, atol=5e-5)
    assert np.abs(got - transformers_logits(source)).max() > 0.1


def test_windows_do_not_see_each_other(mlx):
    """Nor does it matter how many steps a window takes."""
    folder = mlx("llama")[1]
    with MlxBackend(folder) as whole, MlxBackend(folder, n_batch=7) as parts:
        expected = whole.logits_batch(TOKENS)
        np.testing.assert_allclose(parts.logits_batch(TOKENS), expected, atol=1e-5)
        np.testing.assert_array_equal(whole.logits(TOKENS[1]), expected[1])


def log_softmax(logits):
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_bits_equal_mlx_lms_generation(mlx, bits):
    """mlx_lm with --kv-bits from the first token on, one token at a time; the model has one layer."""
    from mlx_lm.generate import generate_step

    folder = mlx("wide")[1]
    model, _ = mlx_lm.utils.load_model(folder)
    prompt, tokens, logp = TOKENS[0], list(TOKENS[0]), []
    with mx.stream(mx.cpu):
        for token, row in generate_step(mx.array(prompt), model, mx.default_stream(mx.cpu), max_tokens=20, kv_bits=bits,
                                        kv_group_size=64, quantized_kv_start=0, prefill_step_size=1):
            tokens.append(token)
            logp.append(np.array(row))
    with MlxBackend(folder, kv_bits=bits) as quantised, MlxBackend(folder) as plain:
        got, exact = quantised.logits(tokens), plain.logits(tokens)
        assert quantised.generate(prompt, 20) == tokens[len(prompt):]
        assert f"{bits}-bit keys and values" in quantised.name
    np.testing.assert_allclose(log_softmax(got)[len(prompt) - 1:-1], logp, atol=1e-4)
    assert np.abs(got - exact).max() > {4: 0.1, 8: 0.003}[bits]
    assert np.abs(got - exact).max() < {4: 2, 8: 0.1}[bits]


def test_tokens_and_bos(mlx):
    with MlxBackend(mlx("llama3_rope")[1]) as backend:
        assert (backend.vocab_size, backend.context_length) == (512, 256)
        assert backend.adds_bos and backend.bos == 507
        ids = backend.tokenize(TEXT, add_bos=False)
        assert backend.detokenize(ids) == TEXT
        assert backend.tokenize(TEXT) == [507, *ids] == backend.tokenize(TEXT, add_bos=True)
        assert backend.tokenize("<|eot_id|>", add_bos=False, special=True) == [511]
        assert len(backend.tokenize("<|eot_id|>", add_bos=False)) > 1
        assert backend.detokenize([511, *ids[:1]], special=False) == backend.detokenize(ids[:1])
        assert backend.tokenize("", add_bos=False) == [] and backend.detokenize([]) == ""
        with pytest.raises(InputError, match="unicode"):
            backend.tokenize("\ud800")
        with pytest.raises(InputError, match="token ids"):
            backend.detokenize([512])
    with MlxBackend(mlx("qwen2")[1]) as backend:
        assert not backend.adds_bos
        with pytest.raises(InputError, match="no beginning-of-sequence"):
            backend.tokenize("a", add_bos=True)


def test_what_does_not_fit(mlx):
    refuses_what_does_not_fit(MlxBackend, mlx("llama")[1])


def test_devices(mlx):
    folder = mlx("llama")[1]
    for device, there in (("mps", mx.metal.is_available()), ("cuda", mx.cuda.is_available()), ("auto", True)):
        if there:
            before = mx.default_device()
            with MlxBackend(folder, device=device) as backend:
                got = backend.logits(TOKENS[0])
            np.testing.assert_allclose(got, transformers_logits(mlx("llama")[0])[0], atol=0.02)
            assert mx.default_device() == before
        else:
            with pytest.raises(InputError, match=f"no {device} device here; use --device cpu"):
                MlxBackend(folder, device=device)
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        MlxBackend(folder, device="tpu")


def test_chat_is_greedy_through_the_template(mlx, copied):
    folder = mlx("smollm2")[1]
    with MlxBackend(folder) as backend:
        prompt = backend.tokenize("<|im_start|>user\nHi there<|im_end|>\n", add_bos=False, special=True)
        expected = []
        while len(expected) < 12:
            token = int(backend.logits([*prompt, *expected])[-1].argmax())
            if token == 2:
                break
            expected.append(token)
        assert len(expected) > 2
        assert backend.generate(prompt, 12) == expected
        assert backend.generate(prompt, 0) == []
        assert backend.chat("Hi there", 12) == backend.detokenize(expected, special=False).strip()
    stop = edit_config(copied(folder), eos_token_id=[2, expected[2]])
    (stop / "generation_config.json").unlink(missing_ok=True)
    with MlxBackend(stop) as backend:
        assert backend.generate(prompt, 12) == expected[:expected.index(expected[2])]
    (stop / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    with MlxBackend(stop) as backend, pytest.raises(InputError, match="chat template fails"):
        backend.chat("Hi")
    (stop / "chat_template.jinja").unlink()
    with MlxBackend(stop) as backend, pytest.raises(InputError, match="no chat template"):
        backend.chat("Hi")
    (stop / "tokenizer.json").write_text("{}")
    with MlxBackend(stop) as backend:
        assert backend.logits([1]).shape == (1, 512)  # needs no tokenizer
        with pytest.raises(InputError, match="cannot load its tokenizer"):
            backend.chat("Hi")
        with pytest.raises(InputError, match="tokenizer.json"):
            backend.tokenize("Hi")


def test_speed(mlx):
    with MlxBackend(mlx("llama")[1]) as backend:
        speed = backend.speed(prompt_tokens=64, decode_tokens=8)
    assert speed.keys() == {"prefill_tokens_per_s", "decode_tokens_per_s"}
    assert all(1 < value < 1e8 for value in speed.values())


def test_close_twice(mlx):
    backend = MlxBackend(mlx("llama")[1])
    assert backend.version == f"mlx-lm {mlx_lm.__version__} (mlx {mx.__version__})"
    backend.close()
    backend.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ["mistral", "llama3_rope", "llama_linear_rope", "llama", "qwen3"])
def test_rope_that_mlx_lm_would_not_read_is_told(tmp_path, case):
    """Folders of transformers 5 converted as they are: wrong logits, and mlx-lm says nothing."""
    source = save_tiny(tmp_path / "float", case, tokenizer="smollm")
    folder = convert(source, tmp_path / "mlx")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with MlxBackend(folder) as backend:
            error = np.abs(backend.logits_batch(TOKENS) - transformers_logits(source)).max()
    told = any("does not read" in str(warning.message) for warning in caught)
    assert told == (error > 1e-3) == (case in ("mistral", "llama3_rope", "llama_linear_rope"))
