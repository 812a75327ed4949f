"""The web page end to end: built, served, and driven in Chromium with a tiny package."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.runtime.evaluate import write_reference_file
from optrot_edge.runtime.metrics import Scores
from optrot_edge.runtime.onnx import OnnxBackend
from optrot_edge.runtime.reference import save_reference
from optrot_edge.runtime.text import PROBE
from tests.examples.web_package import make_tiny_reference, scale_weights
from tests.road import write_text
from tests.tiny_models import save_tiny

WEB = Path(__file__).parents[2] / "examples" / "web"
CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def node_version() -> tuple[int, ...]:
    """Of the node on PATH, (0,) without one."""
    if shutil.which("node") is None:
        return (0,)
    said = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    return tuple(int(part) for part in said.strip().removeprefix("v").split(".")[:2])


NEEDED = {"node 20.19 or newer": node_version() >= (20, 19), "npm": shutil.which("npm"), "chromium": CHROME}
SETTINGS = {"kl_limit": 0.1, "windows": 3, "max_new_tokens": 20}
PHONE, DESKTOP = [390, 844], [1280, 800]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(NEEDED.values()), reason="needs " + " and ".join(
        name for name, there in NEEDED.items() if not there) + ": apt-get install nodejs npm chromium"),
]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The built page."""
    stamp, lock = WEB / "node_modules" / ".package-lock.json", WEB / "package-lock.json"
    if not stamp.exists() or stamp.stat().st_mtime < lock.stat().st_mtime:
        run("npm", "ci")
    out = tmp_path_factory.mktemp("web") / "dist"
    run("npx", "vite", "build", "--outDir", str(out))
    return out


def run(*command):
    done = subprocess.run(command, cwd=WEB, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with the package `model`, `damaged`, and reference files."""
    root = tmp_path_factory.mktemp("packages")
    source = save_tiny(root / "source", "smollm2", tokenizer="smollm")
    package = root / "model"
    pipeline.export(source, package, format="onnx", rotation="hadamard", rotate="r1,r2,r4", r4_block=32,
                    quantizer="rtn", calibration="none")
    damaged = Path(shutil.copytree(package, root / "damaged"))
    scale_weights(damaged, "layers.0.mlp.down_proj", 3.0)
    text = write_text(root / "text.txt").read_text()
    reference = make_tiny_reference(source, text, PROBE)
    save_reference(root / "good.json.gz", reference)
    save_reference(root / "short.json.gz", make_tiny_reference(source, text, PROBE, length=24))
    other = dataclasses.replace(reference, tokens=np.roll(reference.tokens, 7, axis=1))
    save_reference(root / "other.json.gz", other)
    (root / "cut.json.gz").write_bytes((root / "good.json.gz").read_bytes()[:-500])
    (root / "settings.json").write_text(json.dumps(SETTINGS))
    for path in damaged.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # HTTP tells times to the second, and both packages come from one
    return root, reference


class Site:
    """The page on a port of its own, and Chromium profiles that visit it."""

    def __init__(self, dist: Path, root: Path, profile: Path):
        sys.path.insert(0, str(WEB))
        try:
            from serve import make_server
        finally:
            sys.path.remove(str(WEB))
        self.make_server, self.dist, self.profile, self.port = make_server, dist, profile, 0
        self.mounts = {"model": root / "model", "damaged": root / "damaged", "empty": profile.parent,
                       "settings.json": root / "settings.json", "reference.json.gz": root / "good.json.gz"}
        self.start()

    def start(self):
        self.server = self.make_server(self.dist, self.mounts, port=self.port)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def visit(self, query: str, *steps: dict, gpu: bool = False) -> list:
        """Results of opening the page and of the steps after it; gpu: with WebGPU, in software."""
        steps = [{"goto": f"http://localhost:{self.port}/{query}"}, *steps]
        plan = {"profile": str(self.profile), "chrome": CHROME, "gpu": gpu, "steps": steps}
        done = subprocess.run(["node", "tests/drive.mjs", json.dumps(plan)], cwd=WEB, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"HOME": str(self.profile)})
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["failure"] is None, answer
        assert answer["foreign"] == [], "the page asked other hosts"
        return answer["results"]


@pytest.fixture(scope="module")
def site(dist, made, tmp_path_factory):
    site = Site(dist, made[0], tmp_path_factory.mktemp("profile") / "chromium")
    yield site
    site.stop()


def greedy(package: Path, prompt: str, count: int) -> list[int]:
    """onnxruntime-genai's greedy tokens after the chat-templated prompt."""
    import onnxruntime_genai
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                        return_dict=False)
    model = onnxruntime_genai.Model(str(package))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids):]]


def test_page_loads_chats_checks_and_works_offline(site, made, tmp_path):
    root, reference = made
    shots = [{"shot": str(tmp_path / f"{name}-{scheme}.png"), "size": size, "scheme": scheme}
             for name, size in (("phone", PHONE), ("desktop", DESKTOP)) for scheme in ("light", "dark")]
    prompt = "Why is the sky blue?"
    opened, loaded, said, again, checked, *taken = site.visit(
        "", {"load": True}, {"chat": prompt}, {"chat": "And at night?"}, {"check": True}, *shots)
    assert opened["isolated"] and "WebAssembly" in opened["status"] and "to download" in opened["about"]
    assert "works offline" in loaded["status"]
    assert said["ids"] == greedy(root / "model", prompt, SETTINGS["max_new_tokens"])
    assert "tokens/s" in said["rate"] and again["ids"] and not again["problem"]
    assert all(Path(path).stat().st_size > 10_000 for path in taken)

    expected = Scores()
    with OnnxBackend(root / "model") as backend:
        for window, logits in zip([0, 1, 3], backend.iter_logits(reference.tokens[[0, 1, 3]]), strict=True):
            expected.add_from_file(reference, window, logits)
    expected = expected.summary()
    assert checked["kind"] == "pass" and "Pass" in checked["verdict"]
    for name in ("kl_estimate", "kl_mean", "ppl", "ppl_reference", "top1", "tokens"):
        assert checked["numbers"][name] == pytest.approx(expected[name], rel=1e-3), name

    site.stop()
    try:
        opened, _, offline, rechecked = site.visit("", {"load": True}, {"chat": prompt}, {"check": True})
    finally:
        site.start()
    assert "stored on this device" in opened["about"]
    assert offline["ids"] == said["ids"]
    assert rechecked["kind"] == "pass"
    assert rechecked["numbers"]["kl_mean"] == pytest.approx(expected["kl_mean"], rel=1e-3)


def test_webgpu_computes_the_same(site, made):
    """In software, with windows below 32 tokens: from there on attention is wrong on SwiftShader (not on our side)."""
    good = site.mounts["reference.json.gz"]
    site.mounts["reference.json.gz"] = made[0] / "short.json.gz"
    try:
        opened, able, _, expected = site.visit("", {"adapter": True}, {"load": True}, {"check": True}, gpu=True)
        assert "WebAssembly" in opened["status"]  # a GPU in software is not chosen of itself
        if not able:
            pytest.skip("this Chromium has no WebGPU in software")
        opened, _, said, checked = site.visit("?device=webgpu", {"load": True}, {"chat": "Hi"}, {"check": True},
                                              gpu=True)
    finally:
        site.mounts["reference.json.gz"] = good
    assert "WebGPU" in opened["status"]
    assert said["ids"] == greedy(made[0] / "model", "Hi", SETTINGS["max_new_tokens"])
    assert checked["kind"] == "pass"
    assert checked["numbers"]["kl_mean"] == pytest.approx(expected["numbers"]["kl_mean"], rel=1e-3)


def test_a_tokenizer_that_adds_bos(site, made):
    """The reference's probe holds none, its windows begin with one."""
    root, _ = made
    source = save_tiny(root / "adds bos", "llama", tokenizer="llama-bpe")
    pipeline.export(source, root / "bos", format="onnx", rotation="none", quantizer="rtn", calibration="none")
    write_reference_file(source, root / "bos.json.gz", text=(root / "text.txt").read_text(), windows=3, window=48)
    good = site.mounts["reference.json.gz"]
    site.mounts |= {"bos": root / "bos", "reference.json.gz": root / "bos.json.gz"}
    try:
        *_, checked = site.visit("?model=./bos/", {"load": True}, {"check": True})
    finally:
        site.mounts["reference.json.gz"] = good
    assert not checked["problem"] and checked["kind"] == "pass"


def test_damage_fails_the_check(site, made):
    root, _ = made
    *_, checked = site.visit("?model=./damaged/", {"load": True}, {"check": True})
    assert checked["kind"] == "fail" and "above the limit of 0.1" in checked["verdict"]
    good = site.mounts["reference.json.gz"]
    try:
        site.mounts["reference.json.gz"] = root / "other.json.gz"
        *_, checked = site.visit("", {"load": True}, {"check": True})
        assert checked["kind"] == "fail"
        site.mounts["reference.json.gz"] = root / "cut.json.gz"
        *_, checked = site.visit("", {"load": True}, {"check": True})
        assert not checked["verdict"] and "damaged" in checked["problem"]
    finally:
        site.mounts["reference.json.gz"] = good


def test_replaced_package_is_fetched_again(site, made):
    root, _ = made
    good = site.mounts["model"]
    opened, *_ = site.visit("", {"load": True})
    try:
        site.mounts["model"] = root / "damaged"
        opened, _, checked = site.visit("", {"load": True}, {"check": True})
    finally:
        site.mounts["model"] = good
    assert "to download" in opened["about"] and checked["kind"] == "fail"


def test_what_cannot_be_loaded_is_said(site, made, copied):
    opened, = site.visit("?model=./empty/")
    assert "no package at" in opened["problem"]
    broken = copied(made[0] / "model")
    (broken / "onnx" / "model_q4.onnx").write_bytes(b"\0" * 100)
    site.mounts["broken"] = broken
    _, loaded = site.visit("?model=./broken/", {"load": True})
    assert "damaged" in loaded["problem"]
    (broken / "onnx" / "model_q4.onnx_data").unlink()
    opened, = site.visit("?model=./broken/")
    assert "lacks onnx/model_q4.onnx_data" in opened["problem"]


def test_keyboard_reaches_everything_and_stop_stops(site):
    _, _, keys, stopped, *_ = site.visit("", {"load": True}, {"press": ["Tab", "Tab", "Tab"]}, {"stop": "Go on"})
    assert keys[0] == "send"  # the message field had the focus
    assert stopped <= SETTINGS["max_new_tokens"]
