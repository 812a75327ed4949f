"""llama.cpp's quantised KV caches: types, its own rotation on and off, refusals; on the command line too."""

import json
import os

import gguf
import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf import export_gguf
from optrot_edge.runtime.backends import open_package
from optrot_edge.runtime.evaluate import evaluate_package
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.llama_kv_cache import KV_TYPES
from tests.cli_runner import refused, run_ok
from tests.exporters.gguf_models import write_checkpoint
from tests.runtime.byte_llama import TEXT
from tests.runtime.test_llama_cpp import error

TOKENS = np.random.default_rng(0).integers(0, 512, 96)


@pytest.fixture(scope="module")
def gguf_of(tmp_path_factory):
    """`gguf_of(case)`: a float32 GGUF of the tiny model."""
    made = {}

    def file(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            export_gguf(write_checkpoint(folder, case, "float32", "float32"), folder / "m.gguf")
            made[case] = folder / "m.gguf"
        return made[case]

    return file


def logits(path, kv_type, **options):
    with LlamaCppBackend(path, kv_type=kv_type, **options) as backend:
        return backend.logits(TOKENS), backend.kv_cache


def test_every_type(gguf_of):
    """Fewer bits, more error; the order is that of the types' own rounding errors."""
    exact, cache = logits(gguf_of("wide"), "f16")
    assert cache.rotated == []
    errors = {name: error(logits(gguf_of("wide"), name)[0], exact) for name in KV_TYPES}
    assert errors["f32"] == 0 < errors["bf16"] < errors["q8_0"] < errors["q5_1"] < errors["q5_0"]
    assert errors["q5_0"] < min(errors["q4_0"], errors["q4_1"], errors["iq4_nl"]) < 0.3


def test_default_is_f16(gguf_of):
    np.testing.assert_array_equal(logits(gguf_of("wide"), None)[0], logits(gguf_of("wide"), "f16")[0])


def test_rotation_on_and_off(gguf_of, monkeypatch):
    """What llama.cpp says it rotates, and that the switch leaves no trace for contexts made later."""
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE", raising=False)
    wide = gguf_of("wide")  # heads of 64
    on, cache = logits(wide, "q4_0")
    assert cache.rotated == ["keys", "values"]
    off, cache = logits(wide, "q4_0", kv_rotation=False)
    assert cache.rotated == [] and "LLAMA_ATTN_ROT_DISABLE" not in os.environ
    assert error(on, off) > 1e-3
    np.testing.assert_array_equal(logits(wide, "q4_0")[0], on)
    assert logits(wide, "q8_0,f16")[1].rotated == ["keys"]
    assert logits(wide, "F16,q8_0")[1].rotated == ["values"]
    assert logits(gguf_of("smollm2"), "q8_0")[1].rotated == []  # heads of 32
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    assert logits(wide, "q4_0", kv_rotation=False)[1].rotated == []
    assert os.environ["LLAMA_ATTN_ROT_DISABLE"] == "1"


def test_rotation_helps_with_outliers(gguf_of, tmp_path):
    """Two channels of every key 30 times as large, undone in the queries, hurt a rotated 4-bit cache less."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_of("wide").read_bytes())
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        factor = {"blk.0.attn_q.weight": 1 / 30, "blk.0.attn_k.weight": 30}.get(tensor.name)
        if factor:
            tensor.data.reshape(-1, 64, 256)[:, :2] *= factor  # the rows of a head that RoPE turns together
    exact = logits(path, "f16")[0]
    assert error(exact, logits(gguf_of("wide"), "f16")[0]) < 5e-3
    on, off = (error(logits(path, "q4_0,f16", kv_rotation=rotation)[0], exact) for rotation in (True, False))
    assert on < 0.7 * off


def test_generation_and_reused_contexts(gguf_of):
    """Greedy tokens from a quantised cache are those of its own logits, also after the context has grown."""
    with LlamaCppBackend(gguf_of("wide"), kv_type="q4_0") as backend:
        first = backend.logits(TOKENS[:20])
        answer = backend.generate(TOKENS[:20], 5)
        if answer:
            assert answer[0] == first[-1].argmax()
        assert len(backend.logits(np.resize(TOKENS, 256))) == 256  # a new context
        np.testing.assert_array_equal(backend.logits(TOKENS[:20]), first)


def test_refusals(gguf_of, tiny, files):
    for kv_type in ("q2_k", "q8_0,", "q8_0,q8_0,q8_0", "4", ""):
        with pytest.raises(InputError, match="give one of f32, f16, bf16, q8_0"):
            LlamaCppBackend(tiny, kv_type=kv_type)
    for kv_type in (None, "f16", "f32,bf16"):
        with pytest.raises(InputError, match="needs a quantised --kv-type"):
            LlamaCppBackend(tiny, kv_type=kv_type, kv_rotation=False)
    for kv_type, which in (("q8_0,f16", "K"), ("f16,q8_0", "V")):  # heads of 16
        with LlamaCppBackend(tiny, kv_type=kv_type) as backend, \
                pytest.raises(InputError, match=f"{which} cache type q8_0 with block size 32 does not divide"):
            backend.logits([1, 2])
    for package, backend in ((files["checkpoint"], None), (files["gguf"], "torch")):
        with pytest.raises(InputError, match="--kv-type is for GGUF packages; .* runs in torch"):
            open_package(package, backend, kv_type="q8_0")
        with pytest.raises(InputError, match="--no-kv-rotation is for GGUF packages"):
            open_package(package, backend, kv_rotation=False)


def test_report(gguf_of):
    options = {"reference": gguf_of("wide"), "text": TEXT, "windows": 2, "window": 64, "speed": False}
    plain = evaluate_package(gguf_of("wide"), **options)
    assert not {"kv_type", "kv_rotation"} & plain.keys()
    four = evaluate_package(gguf_of("wide"), kv_type="q4_0", **options)
    eight = evaluate_package(gguf_of("wide"), kv_type="q8_0", kv_rotation=False, **options)
    assert (four["kv_type"], four["kv_rotation"]) == ("q4_0", ["keys", "values"])
    assert (eight["kv_type"], eight["kv_rotation"]) == ("q8_0", [])
    assert four["kl_mean"] > 10 * eight["kl_mean"] > 10 * plain["kl_mean"]


def test_command_line(gguf_of, text, capfd):
    wide = gguf_of("wide")
    asked = ["eval", wide, "--reference", wide, "--text", text, "--windows", "1", "--window", "32", "--no-speed"]
    run_ok(*asked, "--kv-type", "q8_0,q4_0", "--no-kv-rotation", "--json")
    assert json.loads(capfd.readouterr().out)["kv_type"] == "q8_0,q4_0"
    run_ok(*asked, "--kv-type", "q8_0")
    assert "KV cache q8_0, keys and values rotated" in " ".join(capfd.readouterr().out.replace("│", " ").split())
    refused(capfd, *asked, "--kv-type", "int8", says="give one of")
