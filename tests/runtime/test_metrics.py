"""Metrics against formulas written out in float64."""

import math

import numpy as np
import pytest

from optrot_edge.runtime.metrics import Scores, log_softmax, mean_and_error, paired_bootstrap, perplexity


def windows(count=3, length=70, vocab=97, seed=0):
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal((count, length, vocab)) * 3).astype(np.float32)
    package = (reference + 0.5 * rng.standard_normal(reference.shape)).astype(np.float32)
    return reference, package, rng.integers(0, vocab, (count, length))


def brute_force(reference, package, tokens):
    """Per-position KL, NLLs and agreement, one position at a time in Python floats."""
    kl, nll, nll_reference, agree = [], [], [], []
    for b in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            p = [math.exp(float(x)) for x in reference[b, t]]
            q = [math.exp(float(x)) for x in package[b, t]]
            zp, zq = math.fsum(p), math.fsum(q)
            kl.append(math.fsum(x / zp * math.log((x / zp) / (y / zq)) for x, y in zip(p, q, strict=True)))
            nll.append(-math.log(q[tokens[b, t + 1]] / zq))
            nll_reference.append(-math.log(p[tokens[b, t + 1]] / zp))
            agree.append(p.index(max(p)) == q.index(max(q)))
    return map(np.array, (kl, nll, nll_reference, agree))


def test_summary_equals_brute_force():
    reference, package, tokens = windows()
    scores = Scores()
    for window in zip(reference, package, tokens, strict=True):
        scores.add(*window)
    kl, nll, nll_reference, agree = brute_force(reference, package, tokens)
    n = len(kl)
    spread = math.sqrt(((kl - kl.mean()) ** 2).sum() / (n - 1))
    spread_nll = math.sqrt(((nll - nll.mean()) ** 2).sum() / (n - 1))
    spread_reference = math.sqrt(((nll_reference - nll_reference.mean()) ** 2).sum() / (n - 1))
    top1 = agree.mean()
    expected = {
        "kl_mean": kl.mean(), "kl_se": spread / math.sqrt(n), "kl_median": np.median(kl),
        "kl_p90": np.quantile(kl, 0.9), "kl_p99": np.quantile(kl, 0.99), "kl_max": kl.max(),
        "kl_upper_bound": kl.mean(), "kl_estimate": kl.mean(), "kl_estimate_se": spread / math.sqrt(n),
        "ppl": math.exp(nll.mean()), "ppl_se": math.exp(nll.mean()) * spread_nll / math.sqrt(n),
        "ppl_reference": math.exp(nll_reference.mean()),
        "ppl_reference_se": math.exp(nll_reference.mean()) * spread_reference / math.sqrt(n),
        "top1": top1, "top1_se": math.sqrt(top1 * (1 - top1) / n),
        "nonfinite": 0, "nonfinite_windows": 0, "windows": 3, "tokens": 3 * 69}
    summary = scores.summary()
    assert summary.keys() == expected.keys()
    for key, value in expected.items():
        assert summary[key] == pytest.approx(value, rel=1e-12), key
    np.testing.assert_allclose(scores.window_kl, kl.reshape(3, -1).mean(1), rtol=1e-12)


def test_identical_logits_have_no_kl():
    reference, _, tokens = windows()
    scores = Scores()
    scores.add(reference[0], reference[0], tokens[0])
    summary = scores.summary()
    assert summary["kl_mean"] == summary["kl_max"] == 0.0
    assert summary["top1"] == 1.0
    assert summary["ppl"] == summary["ppl_reference"]


def test_large_logits_stay_finite():
    logits = np.array([[3e38, -3e38, 0.0], [1e4, 1e4, -1e4]], np.float32)
    logp = log_softmax(logits)
    assert np.isfinite(logp).all()
    np.testing.assert_allclose(np.exp(logp).sum(-1), 1.0, rtol=1e-15)
    assert logp[1, 0] == pytest.approx(-math.log(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_window_is_reported_not_dropped(value):
    reference, package, tokens = windows()
    clean = Scores()
    for b in (0, 2):
        clean.add(reference[b], package[b], tokens[b])
    package[1, 5, 7] = package[1, 6, 8] = value
    scores = Scores()
    for window in zip(reference, package, tokens, strict=True):
        scores.add(*window)
    summary = scores.summary()
    assert (summary["nonfinite"], summary["nonfinite_windows"], summary["windows"]) == (2, 1, 3)
    for key in ("kl_mean", "kl_se", "kl_p99", "kl_max", "ppl", "ppl_se", "top1"):
        assert summary[key] is None
    assert summary["ppl_reference"] > 0
    expected = clean.summary()
    for key, got in summary["finite_windows"].items():
        assert got == expected[key]
    assert np.isnan(scores.window_kl).tolist() == [False, True, False]


def test_all_windows_nonfinite():
    reference, package, tokens = windows(count=1)
    package[:] = np.nan
    scores = Scores()
    scores.add(reference[0], package[0], tokens[0])
    summary = scores.summary()
    assert summary["kl_mean"] is None
    assert "finite_windows" not in summary
    assert summary["nonfinite"] == package.size


def test_perplexity_standard_error_matches_sampling():
    """The delta-method error predicts the spread of the perplexity over repeated draws."""
    rng = np.random.default_rng(1)
    draws = rng.gamma(2.0, 1.0, (4000, 500))
    values = np.array([perplexity(row)[0] for row in draws])
    predicted = np.mean([perplexity(row)[1] for row in draws])
    assert predicted == pytest.approx(values.std(), rel=0.05)
    assert mean_and_error(draws[0])[1] == pytest.approx(draws[0].std(ddof=1) / math.sqrt(500))


def test_paired_bootstrap():
    rng = np.random.default_rng(2)
    b = rng.gamma(2.0, 0.1, 40)
    exact = paired_bootstrap(0.5 * b, b)
    assert exact == pytest.approx((0.5, 0.5, 0.5))  # perfectly paired: no spread
    a = 0.5 * b * rng.lognormal(0, 0.3, 40)
    ratio = paired_bootstrap(a, b)
    assert ratio == paired_bootstrap(a, b)  # seeded
    assert ratio.low < ratio.ratio < ratio.high
    assert ratio.ratio == pytest.approx(a.mean() / b.mean())
    residual = a - ratio.ratio * b  # delta method for a ratio of means
    error = residual.std(ddof=1) / math.sqrt(40) / b.mean()
    assert ratio.high - ratio.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap(a[:-1], b)
