"""`make demo`'s script, whole: a real model to a verified GGUF, fewer evaluation windows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_demo_writes_a_package_and_an_honest_report(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "examples" / "demo.py", "--out", tmp_path, "--windows", "6"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    package = tmp_path / "smollm2-135m-q4_0.gguf"
    assert {path.name for path in tmp_path.iterdir()} == {package.name, "report.json"}
    assert package.stat().st_size == report["bytes"] <= report["bytes_source"]
    assert 0.01 < report["kl_mean"] < 0.12 and report["kl_mean"] < report["kl_p99"]
    assert report["ppl"] < 1.15 * report["ppl_reference"] and report["top1"] > 0.8
    assert report["nonfinite"] == 0 and report["bits_per_weight"] < 6 and report["seconds"] > 0
    assert "4-bit file" in done.stdout and report["answer"].strip()
