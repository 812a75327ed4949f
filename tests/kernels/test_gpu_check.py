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


def test_without_a_gpu_it_says_so():
    run = python(SCRIPT, "kernels")
    assert run.returncode == 2
    assert "no CUDA GPU" in run.stderr and "--interpret" in run.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["objective", "--interpret"]])
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
