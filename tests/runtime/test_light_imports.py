"""A device needs numpy and one runtime: everything here runs with the heavy packages blocked."""

import subprocess
import sys
from pathlib import Path

import pytest

from optrot_edge.runtime.doctor import doctor
from optrot_edge.runtime.evaluate import write_reference_file
from tests.runtime.byte_llama import TEXT

BLOCK = """
import sys
from importlib.machinery import PathFinder
blocked, find = set({names!r}), PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name.partition(".")[0] in blocked else find(name, *where)
"""
HEAVY = ["torch", "transformers", "tokenizers", "datasets", "triton"]


def run(code, *names):
    """Run `code` in a fresh interpreter in which `names` cannot be imported; its output."""
    script = BLOCK.format(names=list(names)) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_import_with_numpy_alone():
    names = [path.stem for path in Path(__file__).parents[2].joinpath("runtime").glob("*.py")]
    assert "evaluate" in names
    code = "import importlib\n" + "\n".join(
        f"importlib.import_module('optrot_edge.runtime.{name}')" for name in names if name != "__init__")
    code += ("\nprint({'torch', 'transformers', 'llama_cpp', 'gguf', 'mlx', 'mlx_lm', 'onnx', 'onnxruntime'}"
             " & set(sys.modules) or 'light')")
    assert run(code, *HEAVY, "llama_cpp", "gguf", "mlx", "mlx_lm", "onnx", "onnxruntime", "onnxruntime_genai", "typer",
               "rich").strip() == "light"


def test_runtime_imports_no_mlx_where_it_is_installed(mlx):
    """Nor does inspecting a package, or telling how many bits it takes."""
    folder = str(mlx("llama", quantize=True, q_bits=4, q_group_size=32)[1])
    code = f"""
import optrot_edge.runtime, optrot_edge.runtime.mlx, optrot_edge.runtime.evaluate
from optrot_edge.runtime.backends import bits_per_weight
from optrot_edge.inspect import inspect_path
print(inspect_path({folder!r})["kind"], bits_per_weight({folder!r}) > 6)
print({{'mlx', 'mlx_lm', 'torch', 'transformers'}} & set(sys.modules) or 'light')
"""
    assert run(code).split() == ["MLX", "package", "True", "light"]
    assert run(code, *HEAVY, "mlx", "mlx_lm", "llama_cpp", "gguf").split() == ["MLX", "package", "True", "light"]


@pytest.mark.slow
def test_mlx_package_evaluates_without_torch(mlx, tmp_path):
    """Where mlx-lm is: transformers and tokenizers are there too, which it needs."""
    source, folder = mlx("llama", quantize=True, q_bits=8, q_group_size=32)
    path = tmp_path / "ref.json"
    write_reference_file(source, path, text=TEXT, windows=2, window=48)
    code = f"""
from optrot_edge.runtime.evaluate import evaluate_package
report = evaluate_package({str(folder)!r}, reference={str(path)!r}, speed=False)
print(report["kl_is_lower_bound"], 0 < report["kl_estimate"] < 0.01, "torch" in sys.modules)
"""
    assert run(code, "torch", "llama_cpp", "triton").split() == ["True", "True", "False"]


def test_onnx_package_evaluates_without_torch(genai, tmp_path):
    """On onnx, onnxruntime and tokenizers; without onnxruntime-genai only the speed is lost. Inspecting needs onnx."""
    source, folder = genai("llama", "int4")
    path = tmp_path / "ref.json"
    write_reference_file(source, path, text=TEXT, windows=2, window=48)
    code = f"""
import warnings
from optrot_edge.inspect import inspect_path
from optrot_edge.runtime.evaluate import evaluate_package
print(inspect_path({str(folder)!r})["kind"], "onnxruntime" in sys.modules)
with warnings.catch_warnings(record=True) as caught:
    report = evaluate_package({str(folder)!r}, reference={str(path)!r})
said = [str(warning.message) for warning in caught]
print(0 < report["kl_estimate"] < 1, report["decode_tokens_per_s"] is None, *said)
"""
    heavy = [name for name in HEAVY if name != "tokenizers"]
    assert run(code, *heavy).split() == ["ONNX", "package", "False", "True", "False"]
    out = run(code, *heavy, "onnxruntime_genai", "llama_cpp", "mlx")
    assert "True True no speed" in out and 'pip install "optrot-edge[onnx]"' in out


@pytest.mark.slow
def test_reference_file_evaluates_without_torch(tiny, noisy, tmp_path):
    path = tmp_path / "ref.json"
    write_reference_file(tiny, path, text=TEXT, windows=2, window=48)
    code = f"""
from optrot_edge.runtime.evaluate import evaluate_package
report = evaluate_package({str(noisy)!r}, reference={str(path)!r})
print(report["kl_is_lower_bound"], 0 < report["kl_mean"] < report["kl_upper_bound"])
report = evaluate_package({str(noisy)!r}, reference={str(tiny)!r}, text={TEXT!r}, windows=1, window=32)
print(report["reference_runtime"].startswith("llama.cpp"), "torch" in sys.modules)
"""
    assert run(code, *HEAVY).split() == ["True", "True", "True", "False"]


@pytest.mark.parametrize(("code", "blocked", "extra"), [
    ("LlamaCppBackend({path!r})", "llama_cpp", "llamacpp"),
    ("TorchBackend({path!r})", "torch", "learn"),
    ("MlxBackend({mlx!r})", "mlx", "mlx"),
    ("MlxBackend({mlx!r})", "mlx_lm", "mlx"),
    ("OnnxBackend({onnx!r})", "onnxruntime", "onnx"),
    ("OnnxBackend({onnx!r})", "onnx", "onnx"),
    ("OnnxBackend({onnx!r}).generate([1], 1)", "onnxruntime_genai", "onnx"),
])
def test_a_missing_runtime_names_its_extra(tiny, mlx, genai, code, blocked, extra):
    code = f"""
from optrot_edge.errors import InputError
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.mlx import MlxBackend
from optrot_edge.runtime.onnx import OnnxBackend
from optrot_edge.runtime.torch_reference import TorchBackend
try:
    {code.format(path=str(tiny), mlx=str(mlx("llama")[1]), onnx=str(genai("llama")[1]))}
except InputError as error:
    print(error)
"""
    out = run(code, blocked)
    assert f'pip install "optrot-edge[{extra}]"' in out and f"needs {blocked}, which is not installed" in out


def test_doctor_rows():
    rows = {row["name"]: row for row in doctor()}
    assert all(row.keys() == {"kind", "name", "usable", "detail", "install"} for row in rows.values())
    assert rows["llama-cpp-python"]["usable"] and rows["torch"]["usable"] and rows["cpu"]["usable"]
    assert rows["llama-cpp-python"]["kind"] == "runtime"
    assert not rows["llama-cpp-python"]["install"]
    assert rows["onnxruntime's providers"]["detail"].endswith("CPUExecutionProvider")
    assert rows["mlx"]["usable"] and rows["mlx-lm"]["usable"] and rows["mlx-lm"]["kind"] == "runtime"
    out = run("from optrot_edge.runtime.doctor import doctor\n"
              "print([r for r in doctor() if r['name'] == 'mlx-lm'], 'mlx' in sys.modules)", "mlx_lm")
    assert "'usable': False" in out and 'optrot-edge[mlx]' in out and out.strip().endswith("False")
    out = run("from optrot_edge.runtime.doctor import doctor\n"
              "print([r for r in doctor() if r['name'] == 'torch'], 'llama_cpp' in sys.modules)", "torch")
    assert "'usable': False" in out and 'optrot-edge[learn]' in out
    assert out.strip().endswith("False")


@pytest.mark.slow
def test_doctor_probe_finds_a_broken_installation(tmp_path, monkeypatch):
    (tmp_path / "mlx.py").write_text("raise OSError('libmlx.so: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    row = {row["name"]: row for row in doctor(probe=True)}["mlx"]
    assert not row["usable"]
    assert "libmlx.so" in row["detail"] and "pip install" in row["install"]
