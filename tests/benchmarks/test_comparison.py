"""Scores against a float64 oracle, intervals against known ratios, and which arm counts as best."""

import numpy as np
import pytest
import torch
from arms import Arm
from comparison import shipping_rows, summarise
from gguf_vs_llama_quantize import plan
from scoring import Reference, bootstrap_ratio
from texts import load_text

from optrot_edge.errors import InputError


def _reference(logits, windows):
    reference = object.__new__(Reference)
    reference.windows, reference.logprobs = windows, logits.log_softmax(-1).numpy()
    return reference


def test_score_is_the_full_vocabulary_kl():
    generator = torch.Generator().manual_seed(0)
    windows = np.random.default_rng(0).integers(50, size=(3, 40))
    first = torch.randn(3, 40, 50, generator=generator)
    second = first + 0.3 * torch.randn(3, 40, 50, generator=generator)
    score = _reference(first, windows).score(iter(second))
    p, q = (x.double().log_softmax(-1).numpy() for x in (first, second))
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(score["kl_windows"], kl.mean(1), rtol=1e-5)
    assert score["kl"] == pytest.approx(kl.mean(), rel=1e-5)
    assert score["top1"] == (p.argmax(-1) == q.argmax(-1)).mean()
    nll = -np.take_along_axis(q[:, :-1], windows[:, 1:, None], -1).mean()
    assert score["ppl"] == pytest.approx(np.exp(nll), rel=1e-5)
    assert score["nonfinite"] == 0


def test_bad_logits_are_counted():
    windows = np.zeros((1, 4), np.int64)
    logits = torch.zeros(1, 4, 8)
    broken = logits.clone()
    broken[0, 2, 3] = torch.nan
    assert _reference(logits, windows).score(iter(broken))["nonfinite"] == 8


def test_bootstrap_is_paired():
    stock = np.random.default_rng(0).gamma(2, size=32)
    halves = bootstrap_ratio(0.5 * stock[None], stock)
    assert halves["ratio"] == pytest.approx(0.5)
    assert halves["low"] == pytest.approx(0.5)
    assert halves["high"] == pytest.approx(0.5)
    spread = bootstrap_ratio(np.stack([0.4 * stock, 0.5 * stock, 0.6 * stock]), stock)
    assert spread["ratio"] == pytest.approx(0.5)
    assert spread["low"] < 0.45 < 0.55 < spread["high"]


def test_bootstrap_interval_covers_the_true_ratio():
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(100):
        stock = rng.gamma(4, 0.25, size=32)
        arm = stock * 0.6 + rng.normal(0, 0.1, size=32)
        interval = bootstrap_ratio(arm[None], stock, resamples=1000, seed=trial)
        inside += interval["low"] <= 0.6 <= interval["high"]
    assert 85 <= inside <= 100


def _row(method, kls, seed=None, **more):
    score = {"kl": float(np.mean(kls)), "kl_windows": list(kls), "ppl": 10.0, "top1": 0.5}
    return {"type": "q4_0", "method": method, "seed": seed, "torch": score, "bytes": 100,
            "bits_per_weight_body": 4.5, **more}


def test_best_is_a_mean_over_seeds_and_no_control():
    stock = np.linspace(1, 2, 8)
    rows = {"a": _row("stock", stock), "b": _row("none", 0.44 * stock),
            "c": _row("none-permuted", 0.1 * stock),
            "d": _row("optrot", 0.3 * stock, 0), "e": _row("optrot", 0.6 * stock, 1)}
    (entry,) = summarise(rows)
    best = entry["best"]
    assert best["method"] == "none"
    assert best["ratio"] == pytest.approx(0.44)
    assert best["reached"]
    seeds = entry["methods"]["optrot"]["seeds"]
    assert [seed["torch"]["ratio"] for seed in seeds] == pytest.approx([0.3, 0.6])


def test_pareto_marks_what_nothing_smaller_beats():
    files = [{"bytes": 10, "kl": 0.5}, {"bytes": 20, "kl": 0.6}, {"bytes": 30, "kl": 0.1}]
    rows = {"a": _row("stock", np.ones(2), shipping=files)}
    assert [file["pareto"] for file in shipping_rows(rows)] == [True, False, True]


def test_plan_repeats_only_what_is_random():
    arms = plan(["q4_0", "iq4_nl"], ["none", "optrot"], [0, 1], control=True)
    assert [arm.id for arm in arms if not arm.stock] == ["q4_0/none", "q4_0/optrot/0", "q4_0/optrot/1",
                                                        "q4_0/none-permuted"]
    assert [arm.id for arm in arms if arm.method == "stock-pure"] == ["q4_0/stock-pure"]
    assert Arm("iq4_nl", "stock") in arms
    assert {arm.id for arm in arms if arm.permuted} == {"q4_0/stock-permuted", "iq4_nl/stock-permuted",
                                                       "q4_0/none-permuted"}


def test_text_parts_are_disjoint(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i // 100) for i in range(1000)))
    text = load_text(path)
    assert text.evaluation == path.read_text()[:600]
    assert text.calibration == path.read_text()[700:]
    with pytest.raises(InputError, match="missing"):
        load_text(tmp_path / "missing")
