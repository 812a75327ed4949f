"""`--rotation auto`: what it tries, what it adopts, what it says, and that nothing else is left."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.auto import Arm, _beats, candidates, explain, held_out_windows
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.inputs import CalibrationInputs, calibration_windows
from optrot_edge.models import open_model
from optrot_edge.quantize.calibration import sample_windows
from optrot_edge.recipe import Recipe
from tests.exporters.gguf_models import llama_logits
from tests.road import save_model
from tests.rotations.test_optrot_plus import make_uneven
from tests.test_pipeline import decoded_logits, spread
from tests.tiny_models import random_tokens

FAST = {"optrot_steps": 2, "optrot_rows": 64, "plus_steps": 6, "nsamples": 32, "seqlen": 32}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """"untied" and "tied": folders of tiny models with uneven channels; do not write into them."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_uneven(save_model(root / name, case))
            for name, case in (("untied", "qwen2_untied"), ("tied", "smollm2"))}


@pytest.fixture(scope="module")
def made(models, text, tmp_path_factory):
    """Checkpoints that auto made of both, and the arguments of every call of `progress`."""
    root, calls = tmp_path_factory.mktemp("made"), {}
    paths = {}
    for name, folder in models.items():
        calls[name] = []
        paths[name] = pipeline.quantize(folder, root / name, calibration=text, **FAST,
                                        progress=lambda *call, name=name: calls[name].append(call))
    return paths, calls


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_checkpoint_is_the_chosen_arm(name, models, made, text, tmp_path):
    """Naming the chosen rotation gives the same weights: auto costs no calibration windows."""
    manifest = QuantizedCheckpoint(made[0][name]).manifest
    arm = next(arm for arm in manifest["auto"]["arms"] if arm["name"] == manifest["auto"]["chosen"])
    again = pipeline.quantize(models[name], tmp_path / "again", calibration=text,
                              **FAST | {"rotation": arm["rotation"], "rotate": arm["rotate"]})
    tokens = random_tokens(1, 24)
    found, expected = decoded_logits(made[0][name], tokens), decoded_logits(again, tokens)
    assert np.array_equal(found, expected)
    assert manifest["rotation"] == QuantizedCheckpoint(again).manifest["rotation"]
    assert manifest["calibration_sha256"] == QuantizedCheckpoint(again).manifest["calibration_sha256"]
    assert manifest["model"] == QuantizedCheckpoint(again).manifest["model"]
    assert (manifest["recipe"]["rotation"], manifest["recipe"]["rotate"]) == ("auto", "r1,r2")


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_only_a_checkpoint_is_left(name, made, tmp_path):
    path = made[0][name]
    files = {entry["file"] for entry in QuantizedCheckpoint(path).manifest["tensors"].values()}
    seen = {name for name in (f"inputs-{file}" for file in files) if "embedding" not in name}  # by calibration
    assert {entry.name for entry in path.iterdir()} == files | seen | {"optrot.json", "tokenizer"}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["tied", "untied"]


def test_what_was_measured_and_why(made):
    """Uneven channels: OptRot+ gains most, as it alone can level them without moving bits about."""
    auto = QuantizedCheckpoint(made[0]["untied"]).manifest["auto"]
    arms = {arm["name"]: arm for arm in auto["arms"]}
    assert list(arms) == ["none", "OptRot+ (R2, scales)", "OptRot", "OptRot+ (R1, R2, scales)"]
    for arm in arms.values():
        assert arm["kl"] > 0 and arm["kl_se"] > 0 and arm["skipped"] is None
        assert arm["cost"] == pytest.approx(arm["kl"] * 4 ** arm["bits_per_weight"])
    assert auto["chosen"].startswith("OptRot+") and min(arms, key=lambda name: arms[name]["cost"]).startswith("OptRot+")
    assert auto["why"].startswith(f"{auto['chosen']}: KL {arms[auto['chosen']]['kl']:.4f} at ")
    assert f"times that without rotation ({arms['none']['kl']:.4f} at " in auto["why"]
    assert f" OptRot {arms['OptRot']['kl']:.4f} at " in auto["why"]  # after "; " or ", "
    calls = made[1]["untied"]
    assert [call[3] for call in calls if call[0] == "arm"] == list(arms)
    assert [call for call in calls if call[0] == "choose"] == [("choose", 1, 1, auto["why"])]


def test_a_dear_head_rules_r1_out(made):
    auto = QuantizedCheckpoint(made[0]["tied"]).manifest["auto"]
    arms = {arm["name"]: arm for arm in auto["arms"]}
    assert list(arms) == ["none", "OptRot+ (R2, scales)", "OptRot", "OptRot+ (R1, R2, scales)"]
    for name in ("OptRot", "OptRot+ (R1, R2, scales)"):
        extra = arms[name]["bits_per_weight"] - arms["none"]["bits_per_weight"]
        assert extra > 0.5 and arms[name]["kl"] is None
        assert arms[name]["skipped"].startswith(f"R1 unties the head from the embedding: {extra:.2f} more bits")
        assert f"; {name} not tried: R1 unties the head" in auto["why"]
    tried = [call[3] for call in made[1]["tied"] if call[0] == "arm"]
    assert tried == ["none", "OptRot+ (R2, scales)"] and auto["chosen"] in tried
    manifest = QuantizedCheckpoint(made[0]["tied"]).manifest
    assert manifest["model"]["tie_word_embeddings"] and "r1" not in manifest["rotation"]["applied"]


def test_kl_is_that_of_the_held_out_windows(models, made, text):
    """The recorded KL again, from the logits of the adopted checkpoint and of the original."""
    from optrot_edge.runtime.torch_reference import TorchBackend

    auto = QuantizedCheckpoint(made[0]["untied"]).manifest["auto"]
    source, recipe = open_model(models["untied"]), Recipe(calibration=text, **FAST)
    with CalibrationInputs(source, recipe, "cpu", held_out=held_out_windows(recipe)) as inputs:
        windows = inputs.held_out.numpy()
    with TorchBackend(made[0]["untied"]) as quantised, TorchBackend(source) as original:
        got, want = ([torch.from_numpy(np.array(x)).double().log_softmax(-1) for x in backend.iter_logits(windows)]
                     for backend in (quantised, original))
        kl = [float((q.exp() * (q - p)).sum(-1)[:-1].mean()) for p, q in zip(got, want, strict=True)]
    chosen = next(arm for arm in auto["arms"] if arm["name"] == auto["chosen"])
    assert len(kl) == 4 and chosen["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert chosen["kl_se"] == pytest.approx(np.std(kl, ddof=1) / 2, rel=1e-2)


@pytest.mark.parametrize("case", ["llama3_rope", "smollm2"])  # with BOS and without
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_windows_are_never_calibrated_on(case, seed, text, tmp_path):
    source = open_model(save_model(tmp_path / "model", case))
    recipe = Recipe(calibration=text, seed=seed, **FAST)
    with CalibrationInputs(source, recipe, "cpu", held_out=5) as inputs:
        tokens, held = inputs.tokens, inputs.held_out
    assert tokens.shape == (32, 32) and held.shape == (5, 32)
    assert not {tuple(row) for row in tokens.tolist()} & {tuple(row) for row in held.tolist()}
    assert torch.equal(tokens, calibration_windows(source, recipe)[0])
    alone = CalibrationInputs(source, recipe, "cpu")
    assert torch.equal(alone.tokens, tokens) and len(alone.held_out) == 0


def test_more_windows_are_other_parts_of_the_text():
    ids = np.arange(1000)
    windows = sample_windows(ids, 20, 32, seed=3, more=6)
    assert windows.shape == (26, 32) and len(np.unique(windows)) == windows.size
    assert np.array_equal(windows[:20], sample_windows(ids, 20, 32, seed=3))


@pytest.mark.parametrize(("nsamples", "windows"), [(1, 2), (8, 2), (32, 4), (128, 16), (1000, 16)])
def test_how_many_windows_are_held_out(nsamples, windows):
    assert held_out_windows(Recipe(nsamples=nsamples)) == windows


def test_a_text_too_short_to_judge_by(models, tmp_path):
    """Enough to calibrate on, not enough to hold windows out: said, and nothing left."""
    short = tmp_path / "t.txt"
    short.write_text("some words of no great interest, " * 100)
    source = open_model(models["untied"])
    slots = next(n for n in range(4, 1000) if _too_short(source, short, n)) - 1
    fields = {**FAST, "calibration": short, "nsamples": slots}
    with pytest.raises(InputError, match=rf"enough for {slots} windows of 32; {slots + slots // 8} were asked for.*"
                                         rf"auto keeps {slots // 8} of them apart to judge by"):
        pipeline.quantize(models["untied"], tmp_path / "c", **fields)
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
    pipeline.quantize(models["untied"], tmp_path / "c", rotation="none", **fields)


def _too_short(source, text, nsamples) -> bool:
    try:
        calibration_windows(source, Recipe(calibration=text, nsamples=nsamples, seqlen=32, rotation="none"))
    except InputError:
        return True
    return False


STAGES = [("arm", 0), ("arm", 1), ("quantise layers", 1), ("judge", 1), ("collect inputs", 1), ("sensitivity", 1),
          ("learn rotation", 1), ("choose", 1)]


@pytest.mark.parametrize(("stage", "at"), STAGES)
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_an_interrupt_keeps_what_is_finished(command, stage, at, models, made, text, tmp_path):
    """The same call goes on, repeats no arm that was judged, and gives what an undisturbed one gives."""
    def fail(name, done, total, note):
        if (name, done) == (stage, at):
            assert list(tmp_path.iterdir())  # something temporary is there
            raise KeyboardInterrupt

    run, calls = getattr(pipeline, command), []
    with pytest.raises(KeyboardInterrupt):
        run(models["tied"], tmp_path / "out", calibration=text, progress=fail, **FAST)
    work = {"quantize": "out.partial", "export": "out.checkpoint.partial"}[command]
    assert [path.name for path in tmp_path.iterdir()] == ([] if (stage, at) == ("arm", 0) else [work])
    run(models["tied"], tmp_path / "out", calibration=text, progress=lambda *call: calls.append(call[0]), **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ("judge" in calls) == (stage != "choose")
    if command == "quantize":
        same = {path.relative_to(made[0]["tied"]): path.read_bytes()
                for path in made[0]["tied"].rglob("*") if path.is_file()}
        assert same == {path.relative_to(tmp_path / "out"): path.read_bytes()
                        for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_an_arm_that_fails_says_why_and_leaves_nothing(models, tmp_path, text):
    with pytest.raises(InputError, match="80 calibration tokens cannot describe inputs of 96"):
        pipeline.quantize(models["tied"], tmp_path / "c", calibration=text, **FAST | {"nsamples": 4, "seqlen": 20})
    with pytest.raises(InputError, match="80 calibration tokens cannot describe inputs of 96"):
        pipeline.plan(models["tied"], calibration=text, **FAST | {"nsamples": 4, "seqlen": 20})
    assert list(tmp_path.iterdir()) == []


def test_exported_to_llama_cpp(models, made, text, tmp_path):
    """The package is the checkpoint's, the summary says what was chosen, and one step gives the same file."""
    summary = pipeline.export(made[0]["untied"], tmp_path / "m.gguf")
    auto = QuantizedCheckpoint(made[0]["untied"]).manifest["auto"]
    assert (summary["auto"], summary["why"]) == (auto["chosen"], auto["why"])
    tokens = random_tokens(1, 24)
    largest, typical = spread(llama_logits(tmp_path / "m.gguf", tokens[0].numpy()),
                              decoded_logits(made[0]["untied"], tokens))
    assert typical < 0.03 and largest < 0.2
    direct = pipeline.export(models["untied"], tmp_path / "direct.gguf", calibration=text, **FAST)
    assert direct["why"] == auto["why"]
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


# the rules, without models

def arm(name="A", kl=(1.0, 1.0), bits=4.5, **fields) -> Arm:
    kl = np.array(kl, dtype=float)
    return Arm(name, "optrot", "r1,r2", kl=float(kl.mean()), bits_per_weight=bits, kl_windows=kl.tolist(), **fields)


def test_a_gain_within_its_error_does_not_count():
    plain = arm(kl=(1.0, 2.0, 3.0, 4.0))
    assert _beats(arm(kl=(0.9, 1.9, 2.9, 3.95)), plain)  # small, but in every window
    assert not _beats(arm(kl=(0.1, 2.8, 2.2, 4.6)), plain)  # 0.075 ± 0.41
    assert not _beats(arm(kl=(1.0, 2.0, 3.0, 4.0)), plain)


@pytest.mark.parametrize(("kl", "wins"), [(0.49, True), (0.51, False)])
def test_half_a_bit_must_halve_the_kl(kl, wins):
    plain = arm(kl=(1.0, 1.0, 1.0), bits=4.5)
    assert _beats(arm(kl=(kl, kl, kl), bits=5.0), plain) is wins
    assert _beats(arm(kl=(kl, kl, kl), bits=4.5), plain)
    assert _beats(plain, arm(kl=(1.001, 1.001, 1.001), bits=5.0))


def test_arms_that_are_not_finite_never_win():
    broken, plain = arm(kl=(1.0, math.nan)), arm(kl=(1.0, 1.0))
    assert not _beats(broken, plain) and _beats(plain, broken) and not _beats(broken, broken)


def test_sentences():
    plain, worse, better = arm("none", (0.2, 0.2)), arm("OptRot", (0.3, 0.3), 4.75), arm("OptRot+", (0.1, 0.1))
    skipped = Arm("X", "optrot", "r1", skipped="too large")
    assert explain([plain, worse], plain) == (
        "none: KL 0.2000 at 4.50 bits per weight on held-out text; no rotation was better per byte: "
        "OptRot 0.3000 at 4.75")
    assert explain([plain, worse, better, skipped], better) == (
        "OptRot+: KL 0.1000 at 4.50 bits per weight on held-out text, 0.50 times that without rotation "
        "(0.2000 at 4.50); OptRot 0.3000 at 4.75; X not tried: too large")
    assert explain([plain], plain) == "none: KL 0.2000 at 4.50 bits per weight on held-out text"
    assert "without rotation is not finite" in explain([arm("none", (math.nan, 1)), better], better)


R2, ALL = "OptRot+ (R2, scales)", "OptRot+ (R1, R2, scales)"


@pytest.mark.parametrize(("name", "fields", "expected"), [
    ("untied", {}, ["none", R2, "OptRot", ALL]), ("tied", {}, ["none", R2, "OptRot", ALL]),
    ("untied", {"scales": False}, ["none", "OptRot+ (R2)", "OptRot", "OptRot+ (R1, R2)"]),
    ("untied", {"rotate": "r2"}, ["none", R2]), ("tied", {"rotate": "r2", "scales": False}, ["none", "OptRot+ (R2)"]),
    ("tied", {"rotate": ""}, ["none", "OptRot+ (scales)"]), ("tied", {"rotate": "", "scales": False}, ["none"]),
    ("tied", {"rotate": "r3", "scales": False}, ["none"]),
    ("tied", {"rotate": "r4,r1", "scales": False}, ["none", "OptRot", "OptRot+ (R1, R4)"])])
def test_candidates(name, fields, expected, models):
    """In order of simplicity, and each a recipe that is accepted."""
    recipe, sizes = Recipe(**fields), iter(range(1, 9))
    arms = candidates(open_model(models[name]), recipe, lambda arm: next(sizes))
    assert [arm.name for arm in arms] == expected
    for arm in arms:
        Recipe(**{**fields, "rotation": arm.rotation, "rotate": arm.rotate})
    assert [arm.bits_per_weight for arm in arms] == sorted(arm.bits_per_weight for arm in arms)


@pytest.mark.parametrize(("extra", "skipped"), [(0.49, False), (0.51, True)])
def test_the_size_that_rules_an_arm_out(extra, skipped, models):
    source = open_model(models["tied"])
    weights = 2 * (2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 160 + 2 * 96) + 512 * 96 + 96
    arms = candidates(source, Recipe(), lambda arm: weights * (4.5 + extra * (arm.name == "OptRot")))
    assert [arm.name for arm in arms if arm.skipped] == ["OptRot"] * skipped
    assert arms[2].bits_per_weight == pytest.approx(4.5 + extra)
