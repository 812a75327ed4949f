"""The web page's arithmetic: node's tests, on numbers of the Python code that are compared here first."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from optrot_edge.runtime.metrics import Scores
from optrot_edge.runtime.reference import make_reference, read_reference, save_reference
from tests.runtime.test_reference_file import Given

WEB = Path(__file__).parents[2] / "examples" / "web"
CASE = WEB / "tests" / "case.json"
NAMES = ("kl_mean", "kl_se", "kl_estimate", "kl_estimate_se", "ppl", "ppl_se", "ppl_reference", "ppl_reference_se",
         "top1", "top1_se", "tokens", "nonfinite")


def make_case(path: Path) -> None:
    """Write the fixture: a reference file of random logits, other logits, and what Python makes of both."""
    rng = np.random.default_rng(0)
    original = (2 * rng.standard_normal((2, 14, 40))).astype(np.float32)
    package = (original + 0.4 * rng.standard_normal(original.shape)).astype(np.float32)
    tokens = rng.integers(0, 40, (2, 14)).astype(np.int32)
    saved = path.with_suffix(".reference")
    save_reference(saved, make_reference(Given(original), tokens, top_k=6, model_name="random"))
    stored = {"dtype": "<f4", "shape": list(package.shape), "base64": base64.b64encode(package.tobytes()).decode()}
    case = {"reference": json.loads(saved.read_text()), "logits": stored, "summary": summary_of(saved, package)}
    saved.unlink()
    path.write_text(json.dumps(case, indent=1) + "\n")


def summary_of(reference: Path, package: np.ndarray) -> dict:
    reference, scores = read_reference(reference), Scores()
    for window, logits in enumerate(package):
        scores.add_from_file(reference, window, logits)
    summary = scores.summary()
    return {name: summary[name] for name in NAMES}


def test_fixture_holds_what_python_computes(tmp_path):
    case = json.loads(CASE.read_text())
    (tmp_path / "reference.json").write_text(json.dumps(case["reference"]))
    logits = np.frombuffer(base64.b64decode(case["logits"]["base64"]), "<f4").reshape(case["logits"]["shape"])
    assert summary_of(tmp_path / "reference.json", logits) == pytest.approx(case["summary"], rel=1e-12)
    make_case(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["summary"] == pytest.approx(case["summary"], rel=1e-6)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: apt-get install nodejs")
def test_page_computes_the_same():
    tests = sorted(str(path) for path in (WEB / "tests").glob("*.test.js"))
    done = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, cwd=WEB)
    assert done.returncode == 0, done.stdout + done.stderr
