"""`make gpu-check` where there is no GPU, and the kernels through Triton's compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"

pytest.importorskip("triton")


def python(*arguments, **variables):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=300)


@pytest.mark.slow
def test_kernels_steps_in_the_interpreter(tmp_path):
    out = tmp_path / "gpu_check.json"
    out.write_text('{"rotation": {"rows": []}}')
    run = python(SCRIPT, "--interpret", "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = json.loads(out.read_text())
    assert set(steps) == {"rotation", "kernels", "objective", "hadamard", "fake-quant"}
    assert steps["rotation"] == {"rows": []}  # other steps' results stay
    assert steps["kernels"]["passed"] and steps["kernels"]["cases"] > 400
    assert {row["kernel"] for row in steps["kernels"]["worst"]} == {"fourth_power", "block_hadamard", "fake_quantize",
                                                              "solve_block"}
    for name in ("objective", "hadamard", "fake-quant"):
        times = [value for row in steps[name]["rows"] for key, value in row.items() if key.startswith("kernel")]
        assert len(times) > 3 and min(time for time in times if time is not None) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault", "shown"), [
    ("fourth_power_triton", "lambda r: r[1].mul_(1.02)", "gradient"),
    ("fourth_power_triton", "lambda r: r[0].mul_(1.00001)", "loss"),
    ("block_hadamard_triton", "lambda r: r.mul_(1.0001)", "block_hadamard"),
    ("block_hadamard_triton", "lambda r: r.mul_(float('nan'))", "'error': inf"),
    ("fake_quantize_triton", "lambda r: isinstance(r, tuple) and r[1].mul_(1.0001)", "fake_quantize"),
    ("solve_block_triton", "lambda r: r[1].mul_(1.001)", "'case': 'errors'"),
    ("solve_block_triton", "lambda r: r[0][::9].bitwise_xor_(1)", "unlike the twin"),
])
def test_a_wrong_kernel_fails_the_run(name, fault, shown, tmp_path):
    program = f"""
import sys; sys.argv = ['gpu_check.py', '--interpret']
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check, gpu_kernels
gpu_kernels.BLOCKS, gpu_kernels.CORES = (2, 64), ((12, 4),)
kernel = gpu_kernels.{name}
def spoilt(*arguments, **named):
    result = kernel(*arguments, **named)
    ({fault})(result)
    return result
gpu_kernels.{name} = spoilt
sys.exit(gpu_check.main(['--interpret', 'kernels', '--out', {str(tmp_path / "out.json")!r}]))
"""
    run = python("-c", program)
    assert run.returncode == 1, run.stdout + run.stderr
    wrong = [line for line in run.stdout.splitlines() if line.startswith("OUT OF TOLERANCE")]
    assert wrong and shown in run.stdout and "FAILED: kernels" in run.stdout
    kernel = name.removesuffix("_triton")
    assert {row["kernel"] for row in json.loads((tmp_path / "out.json").read_text())["kernels"]["failed"]} == {kernel}


def test_a_contender_that_cannot_run_is_named_and_a_kernel_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_speed

    def broken():
        raise RuntimeError("no compiler")

    times, failures = gpu_speed.milliseconds("cpu", {"kernel": lambda: None, "compiled": broken, "dense": None})
    assert times["kernel"] >= 0 and times["compiled"] is None and times["dense"] is None
    assert failures == {"compiled": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        gpu_speed.milliseconds("cpu", {"kernel": broken})


def test_a_step_that_breaks_off_is_recorded_and_the_others_run(tmp_path):
    """With its error; what it set is set back."""
    out = tmp_path / "out.json"
    program = f"""
import sys; sys.argv = ['gpu_check.py', '--interpret']
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check, gpu_speed, torch
gpu_speed.random_problem = lambda *_, **__: 1 / 0
gpu_check.IN_INTERPRETER = {{name: gpu_check.IN_INTERPRETER[name] for name in ('objective', 'fake-quant')}}
print('ended', gpu_check.main(['--interpret', '--out', {str(out)!r}]), torch.get_float32_matmul_precision())
"""
    run = python("-c", program)
    assert "ended 1 highest" in run.stdout and "FAILED: objective" in run.stdout, run.stdout + run.stderr
    steps = json.loads(out.read_text())
    assert steps["objective"]["error"] == "ZeroDivisionError: division by zero" and not steps["objective"]["passed"]
    assert steps["fake-quant"]["rows"] and "ZeroDivisionError" in run.stderr


def test_gptqs_bars_fail_what_is_too_slow(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_gptq

    assert [row["passed"] for row in gpu_gptq.bars("a", {"over_plain": 20.0, "over_products": 3.0})] == [True, True]
    assert [row["passed"] for row in gpu_gptq.bars("a", {"over_plain": 19.9, "over_products": 3.1})] == [False, False]


ROAD = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('gguf', 'typer', 'rich', 'llama_cpp', 'datasets', 'transformers'):
            raise ModuleNotFoundError(name + ' is not installed here', name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check, gpu_road, gpu_8b, gpu_gptq
"""


@pytest.mark.slow
def test_road_steps_need_torch_triton_numpy_and_safetensors_only(tmp_path):
    out = tmp_path / "gpu_check.json"
    out.write_text('{"objective": {"rows": []}}')
    run = python("-c", ROAD + f"sys.exit(gpu_check.main(['--cpu', '--out', {str(out)!r}]))")
    assert run.returncode == 0, run.stdout + run.stderr
    steps = json.loads(out.read_text())
    assert set(steps) == {"objective", "rotation", "quantizer", "gptq", "optrot-8b"}
    for name, checks in (("rotation", 10), ("quantizer", 11), ("gptq", 1), ("optrot-8b", 6)):
        assert steps[name]["passed"] and len(steps[name]["checks"]) == checks
        timings = [value for row in steps[name]["timings"] for key, value in row.items()
                   if key.endswith(("ms", "seconds"))]
        assert len(timings) > 2 and min(timings) > 0


# What the device's side of the comparison does wrong, with the call of each pair that is the device's.
FAULTS = {
    "rotation": [
        (0, "learn", "lambda r: setattr(r, 'r1', r.r1 * (1 + 1e-11))", "orthogonality"),
        (0, "learn", "lambda r: r.recipe.update(loss=r.recipe['loss'] * 1.01)", "loss against the CPU's"),
        (0, "learn", "lambda r: r.recipe.update(loss=float('nan'))", "'measured': nan"),
        (0, "learn", "lambda r: r.recipe.update(loss_start=r.recipe['loss'])", "loss over the start's"),
        (1, "logits", "lambda r: r.mul_(1.001)", "rotated logits"),
    ],
    "quantizer": [
        (1, "hessian_of", "lambda r: r.mul_(1.0001)", "Hessian"),
        (1, "Grid.fit", "lambda r: r.scales[0].mul_(1.01)", "share of equal scales"),
        (1, "gptq", "lambda r: r[0].bitwise_xor_(1)", "GPTQ's output error"),
        (1, "QuantizerOptions", "lambda r: setattr(r, 'method', 'rtn')", "SequentialQuantizer"),
    ],
    "gptq": [
        (1, "gptq", "lambda r: r[0].bitwise_xor_(1)", "output error against the plain loop's"),
    ],
    "optrot-8b": [
        (0, "learn", "lambda r: r.recipe.update(loss=r.recipe['loss'] * 1.001)", "loss against the fused weights'"),
        (1, "learn", "lambda r: setattr(r, 'r1', r.r1.roll(1, 0))", "loss against the fused weights'"),
        (0, "learn", "lambda r: setattr(r, 'r2', r.r2 * (1 + 1e-11))", "orthogonality"),
        (1, "learn", "lambda r: r.recipe.update(loss_start=r.recipe['loss'])", "loss over the start's"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("step", FAULTS)
def test_a_fault_on_the_device_fails_the_run(step, tmp_path):
    program = ROAD + f"""
def spoil(owner, name, turn, fault):
    function, calls = getattr(owner, name), []
    def spoilt(*arguments, **named):
        result = function(*arguments, **named)
        calls.append(name)
        if len(calls) % 2 == (turn + 1) % 2:
            fault(result)
        return result
    setattr(owner, name, spoilt)
    return function

gpu_road.learning_times = gpu_road.quantizing_times = lambda device: [{{'what': 'skipped'}}]
for turn, path, fault, shown in {FAULTS[step]!r}:
    *owner, name = path.split('.')
    module = {{'optrot-8b': gpu_8b, 'gptq': gpu_gptq}}.get({step!r}, gpu_road)
    owner = getattr(module, owner[0]) if owner else module
    sound = spoil(owner, name, turn, eval(fault))
    print('fault', shown, gpu_check.main(['--cpu', {step!r}, '--out', {str(tmp_path / "out.json")!r}]))
    setattr(owner, name, sound)
print('sound', gpu_check.main(['--cpu', {step!r}, '--out', {str(tmp_path / "out.json")!r}]))
"""
    run = python("-c", program)
    assert run.returncode == 0, run.stdout + run.stderr
    *reports, last = run.stdout.split("fault ")
    for (_, _, _, shown), report, after in zip(FAULTS[step], reports, [*reports[1:], last], strict=True):
        assert any(line.startswith("OUT OF TOLERANCE") and shown in line for line in report.splitlines()), report
        assert after.startswith(f"{shown} 1\n")
    assert "sound 0\n" in last


def test_without_a_gpu_it_says_so():
    run = python(SCRIPT, "kernels")
    assert run.returncode == 2
    assert "no CUDA GPU" in run.stderr and "--interpret" in run.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["rotation", "--interpret"], ["kernels", "--cpu"],
                                       ["--cpu", "--interpret"]])
def test_bad_usage(arguments):
    run = python(SCRIPT, *arguments)
    assert run.returncode == 2 and "usage:" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "120"])
def test_kernels_compile_without_a_gpu(architecture, tmp_path):
    run = python(ROOT / "tests" / "kernels" / "compile_kernels.py", architecture,
                 TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "compiled"
