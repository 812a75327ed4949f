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
def test_kernels_step_in_the_interpreter(tmp_path):
    out = tmp_path / "gpu_check.json"
    out.write_text('{"objective": {"rows": []}}')
    run = python(SCRIPT, "kernels", "--interpret", "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = json.loads(out.read_text())
    assert steps["objective"] == {"rows": []}  # other steps' results stay
    assert steps["kernels"]["passed"] and steps["kernels"]["cases"] > 90
    assert {row["kernel"] for row in steps["kernels"]["worst"]} == {"fourth_power", "block_hadamard"}


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_run(tmp_path):
    """The twin replaced by one that is off by one part in ten thousand, or gives NaN."""
    for fault, shown in (("* 1.0001", "OUT OF TOLERANCE"), ("* float('nan')", "'error': inf")):
        program = ("import sys; sys.argv = ['gpu_check.py', '--interpret']\n"
                   f"sys.path.insert(0, '{SCRIPT.parent}')\n"
                   "import gpu_check, optrot_edge.kernels.hadamard as h\n"
                   "twin = h.block_hadamard_torch\n"
                   f"h.block_hadamard_torch = lambda x, block: twin(x, block) {fault}\n"
                   f"sys.exit(gpu_check.main(['--interpret', '--out', '{tmp_path / 'out.json'}']))")
        run = python("-c", program)
        assert run.returncode == 1, run.stdout + run.stderr
        assert shown in run.stdout and "FAILED: kernels" in run.stdout
        assert json.loads((tmp_path / "out.json").read_text())["kernels"]["failed"]


ROAD = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('gguf', 'typer', 'rich', 'llama_cpp', 'datasets', 'transformers'):
            raise ModuleNotFoundError(name + ' is not installed here', name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check, gpu_road
"""


@pytest.mark.slow
def test_road_steps_need_torch_triton_numpy_and_safetensors_only(tmp_path):
    out = tmp_path / "gpu_check.json"
    out.write_text('{"objective": {"rows": []}}')
    run = python("-c", ROAD + f"sys.exit(gpu_check.main(['--cpu', '--out', {str(out)!r}]))")
    assert run.returncode == 0, run.stdout + run.stderr
    steps = json.loads(out.read_text())
    assert set(steps) == {"objective", "rotation", "quantizer"}
    for name, checks in (("rotation", 10), ("quantizer", 11)):
        assert steps[name]["passed"] and len(steps[name]["checks"]) == checks
        timings = [value for row in steps[name]["timings"] for key, value in row.items() if key.endswith("ms")]
        assert len(timings) > 4 and min(timings) > 0


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
    owner = getattr(gpu_road, owner[0]) if owner else gpu_road
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


@pytest.mark.parametrize("arguments", [["nonsense"], ["objective", "--interpret"], ["kernels", "--cpu"],
                                       ["--cpu", "--interpret"]])
def test_bad_usage(arguments):
    run = python(SCRIPT, *arguments)
    assert run.returncode == 2 and "usage:" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_kernels_compile_without_a_gpu(architecture, tmp_path):
    run = python(ROOT / "tests" / "kernels" / "compile_kernels.py", architecture,
                 TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "compiled"
