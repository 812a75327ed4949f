"""R4 in real llama.cpp through the eval callback."""

import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from optrot_edge.runtime import llama_r4
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.llama_library import load_library
from optrot_edge.runtime.llama_r4 import R4Callback
from optrot_edge.sylvester import kronecker_orders, sylvester
from tests.cli_runner import run_ok
from tests.tiny_models import random_tokens

FLOATS = dict.fromkeys(("type", "embedding_type", "head_type"), "f32")
R4 = {"rotation": "hadamard", "rotate": "r1,r2,r4", "r4_block": 32, "quantizer": "rtn", "calibration": "none"}
TOKENS = random_tokens(1, 24)


class Nothing:
    """Applies no R4."""

    def install(self, params):
        """Leave the graph alone."""

    begin = check = lambda self: None


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("r4") / "r4.gguf"
    pipeline.export(model("smollm2"), path, **R4, **FLOATS)
    return path


def largest(found, want) -> float:
    return float(np.abs(found - want).max() / want.std())


def original(folder) -> np.ndarray:
    return logits(open_model(folder), TOKENS)[0].numpy()


@pytest.mark.parametrize("block", [2, 8, 64, 128, 256, 512])
def test_the_transform_is_sylvesters(block):
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = np.random.default_rng(0).standard_normal((3, 4, block)).astype(np.float32)
    found = llama_r4.transform(x.reshape(-1), *map(sylvester, kronecker_orders(block))).reshape(x.shape)
    np.testing.assert_allclose(found, x @ matrix / block**0.5, atol=2e-6)


@pytest.mark.parametrize("case", ["llama_bias", "mistral", "qwen2", "qwen3", "llama3_rope"])
@pytest.mark.parametrize("n_batch", [7, 512])
def test_logits_are_the_originals(case, n_batch, model, tmp_path):
    """Of every family, in one or several batches; keys and values are cached in float16."""
    pipeline.export(model(case), tmp_path / "m.gguf", **R4, **FLOATS)
    with LlamaCppBackend(tmp_path / "m.gguf", n_batch=n_batch) as backend:
        found = backend.logits(TOKENS[0].numpy())
        np.testing.assert_array_equal(found, backend.logits(TOKENS[0].numpy()))
    assert largest(found, original(model(case))) < 0.01


def test_quantised_logits_are_the_checkpoints(model, tmp_path):
    """llama.cpp rounds activations to 8 bits, R4's result too."""
    checkpoint = pipeline.quantize(model("smollm2"), tmp_path / "c", type="q8_0", **R4)
    pipeline.export(checkpoint, tmp_path / "m.gguf")
    want = logits(DecodedCheckpoint(checkpoint), TOKENS)[0].numpy()
    with LlamaCppBackend(tmp_path / "m.gguf") as backend:
        found = backend.logits(TOKENS[0].numpy())
    assert np.sqrt(np.square(found - want).mean()) / want.std() < 0.03


def test_without_the_callback_the_logits_are_wrong(package, model):
    with LlamaCppBackend(package, r4=Nothing()) as backend:
        assert largest(backend.logits(TOKENS[0].numpy()), original(model("smollm2"))) > 0.5


def test_a_tensor_that_never_comes_is_an_error(package, monkeypatch):
    """Another llama.cpp may name it otherwise; the answer is never a wrong one."""
    monkeypatch.setattr(llama_r4, "TENSOR", "ffn_gate_par")
    with LlamaCppBackend(package) as backend:
        for use in (lambda: backend.logits([1, 2, 3]), lambda: backend.generate([1, 2, 3], 4), backend.speed):
            with pytest.raises(InputError, match="computed no ffn_gate_par-0, so that R4 could not be applied"):
                use()


def test_one_layer_less_is_an_error(package):
    callback = R4Callback(load_library(), 32, 160, 3)
    with LlamaCppBackend(package, r4=callback) as backend, pytest.raises(InputError, match="no ffn_swiglu-2"):
        backend.logits([1, 2, 3])


def test_errors_inside_the_callback_come_out(package, monkeypatch):
    callback = R4Callback(load_library(), 32, 96, 2)
    with (LlamaCppBackend(package, r4=callback) as backend,
          pytest.raises(InputError, match="ffn_swiglu-0 is not float32 in rows of 96")):
        backend.logits([1, 2])

    def interrupt(*_):
        raise KeyboardInterrupt

    with LlamaCppBackend(package) as backend:
        monkeypatch.setattr(llama_r4, "transform", interrupt)
        with pytest.raises(KeyboardInterrupt):
            backend.logits([1, 2])
        monkeypatch.undo()
        assert np.isfinite(backend.logits([1, 2])).all()


def test_eval_and_chat(package, model, text, capfd):
    report = pipeline.evaluate(package, model("smollm2"), text=text, windows=2, window=48)
    assert report["kl_mean"] < 1e-4 and report["top1"] > 0.98 and report["decode_tokens_per_s"] > 0
    assert report["runtime"].startswith("llama.cpp")
    in_torch = pipeline.evaluate(package, model("smollm2"), text=text, windows=2, window=48, backend="torch")
    assert in_torch["kl_mean"] < 1e-8
    capfd.readouterr()
    answers = []
    for path in (package, package.with_name("plain.gguf")):
        if not path.exists():
            pipeline.export(model("smollm2"), path, **R4 | {"rotation": "none"}, **FLOATS)
        run_ok("chat", path, "Hi", "--max-tokens", "6")
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] != ""
