"""examples/llama_cpp, compiled against the libllama of llama-cpp-python."""

import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.tiny_models import random_tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama_cpp"
PACKAGE = Path(llama_cpp.__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-isystem", PACKAGE.parent / "include"]
R4 = {"rotation": "hadamard", "rotate": "r1,r2,r4", "r4_block": 32, "quantizer": "rtn", "calibration": "none"}
FLOATS = dict.fromkeys(("type", "embedding_type", "head_type"), "f32")

pytestmark = pytest.mark.skipif(not shutil.which("cc") or not PACKAGE.parent.joinpath("include", "llama.h").exists(),
                                reason="needs a C compiler, and llama.h beside llama-cpp-python")


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace",
                          timeout=300)


def compiled(out: Path, *options, library: Path = EXAMPLE / "optrot_r4.c") -> Path:
    """`r4_logits` of the example's C, linked to the installed llama.cpp."""
    libraries = [f"-L{PACKAGE / 'lib'}", f"-Wl,-rpath,{PACKAGE / 'lib'}", "-lllama", "-lggml", "-lggml-base", "-lm"]
    done = run("cc", "-std=c11", "-O3", *WARNINGS, "-I", EXAMPLE, "-o", out, library,
               Path(__file__).with_name("r4_logits.c"), *options, *libraries)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """`r4_logits` as it is ("host") and where no memory counts as the host's ("device")."""
    folder = tmp_path_factory.mktemp("programs")
    programs = {"host": compiled(folder / "host")}
    if sys.platform == "linux":
        programs["device"] = compiled(folder / "device", "-Wl,--wrap=ggml_backend_buffer_is_host")
    return programs


def logits_in_c(program: Path, path: Path, ids: np.ndarray, n_ubatch: int = 64, cache: str = "f32") -> np.ndarray:
    out = path.with_suffix(".logits")
    done = run(program, path, out, cache, n_ubatch, *ids.tolist())
    assert done.returncode == 0, done.stderr
    return np.fromfile(out, np.float32).reshape(len(ids), -1)


@pytest.mark.parametrize(("case", "block"), [("smollm2", 2), ("smollm2", 4), ("llama_bias", 32), ("qwen2", 16),
                                             ("qwen3", 8), ("wide", 512)])
def test_logits(case, block, model, programs, tmp_path):
    """They are the original's, in one or several micro-batches, of which the last is shorter."""
    path = tmp_path / "m.gguf"
    pipeline.export(model(case), path, **R4 | {"r4_block": block}, **FLOATS)
    ids = random_tokens(1, 24)[0]
    want = logits(open_model(model(case)), ids[None])[0].numpy()
    for program in programs.values():
        for n_ubatch in (7, 64):
            found = logits_in_c(program, path, ids.numpy(), n_ubatch)
            assert np.abs(found - want).max() < 5e-5 * want.std()


def test_quantised_logits_are_pythons(model, programs, tmp_path):
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", **R4, type="q4_0")
    ids = random_tokens(1, 24)[0].numpy()
    with LlamaCppBackend(tmp_path / "m.gguf") as backend:
        want = backend.logits(ids)
    for program in programs.values():
        found = logits_in_c(program, tmp_path / "m.gguf", ids, cache="default")
        assert np.sqrt(np.square(found - want).mean()) < 1e-3 * want.std()


def test_plain_files_run_too(model, programs, tmp_path):
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", **R4 | {"rotate": "r1,r2"}, **FLOATS)
    ids = random_tokens(1, 24)[0]
    want = logits(open_model(model("smollm2")), ids[None])[0].numpy()
    assert np.abs(logits_in_c(programs["host"], tmp_path / "m.gguf", ids.numpy()) - want).max() < 5e-5 * want.std()


def u32(key: bytes, value: int) -> bytes:
    return key + (4).to_bytes(4, "little") + value.to_bytes(4, "little")


@pytest.mark.parametrize(("old", "new", "message"), [
    (b"GGUF", b"GGML", "not a GGUF"),
    (b"optrot.r4_block", b"optrot.r4_blick", "incomplete or do not fit"),
    (b"optrot.base_architecture", b"optrot.bose_architecture", "incomplete or do not fit"),
    (u32(b"optrot.r4_block", 32), u32(b"optrot.r4_block", 64), "incomplete or do not fit"),
    (u32(b"optrot.format_version", 1), u32(b"optrot.format_version", 2), "newer format"),
    (u32(b"llama.block_count", 2), u32(b"llama.block_count", 2**31), "incomplete or do not fit"),
])
def test_damaged_files_are_refused(old, new, message, model, programs, tmp_path):
    path = tmp_path / "m.gguf"
    pipeline.export(model("smollm2"), path, **R4, type="q4_0")
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))
    done = run(programs["host"], path, tmp_path / "out", "f32", 64, 1, 2)
    assert done.returncode == 1 and message in done.stderr


def test_a_graph_without_the_tensor_is_an_error(model, tmp_path):
    """Compiled for another name of it, which this llama.cpp's graph does not have."""
    source = (EXAMPLE / "optrot_r4.c").read_text()
    assert source.count('"ffn_swiglu-"') == 1
    (tmp_path / "other.c").write_text(source.replace('"ffn_swiglu-"', '"ffn_gate_par-"'))
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", **R4, type="q4_0")
    program = compiled(tmp_path / "program", library=tmp_path / "other.c")
    done = run(program, tmp_path / "m.gguf", tmp_path / "out", "f32", 64, 1, 2)
    assert done.returncode == 1 and "no ffn_swiglu in every layer" in done.stderr


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_the_chat_program(model, tmp_path):
    """Built by its CMakeLists.txt; greedy answers are those of `optrot-edge chat`, and the guard is no obstacle."""
    done = run("cmake", "-S", EXAMPLE, "-B", tmp_path / "build", "-DLLAMA_CPP_PYTHON=ON",
               f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_C_FLAGS=-Wall -Wextra -Wpedantic -Werror")
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    chat = tmp_path / "build" / "optrot-chat"
    for name, fields in (("r4", R4), ("plain", R4 | {"rotation": "none"})):
        path = tmp_path / f"{name}.gguf"
        pipeline.export(model("smollm2"), path, **fields, **FLOATS)
        with LlamaCppBackend(path) as backend:
            ids = backend.tokenize("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", special=True)
            want = backend.detokenize(backend.generate(ids, 12), special=False)
        done = run(chat, path, "Hi there", 12, 1)
        assert done.returncode == 0 and done.stdout == want + "\n", done.stderr
    done = run(chat, path)
    assert done.returncode == 1 and "usage: optrot-chat" in done.stderr
