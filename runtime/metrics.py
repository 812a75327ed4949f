"""Perplexity, KL divergence and top-1 agreement, accumulated window by window in float64.

Which positions count: position t of a window predicts token t + 1, so a window of n tokens has n - 1
scored positions, for perplexity, KL and top-1 alike; the last position has no target. When windows begin
with BOS, the position of BOS is scored like any other.

Standard errors treat scored positions as independent. Positions of one window are correlated, so
comparisons between packages use `paired_bootstrap` on the mean KL of each window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CHUNK = 64  # rows in float64 at a time: 64 x 152k x 8 bytes = 78 MB


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def token_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Negative log-likelihood (nats) of tokens[1:] under logits[:-1]: [n, vocab], [n] -> float64 [n - 1]."""
    out = np.empty(len(tokens) - 1)
    for i in range(0, len(out), CHUNK):
        targets = tokens[i + 1:i + 1 + CHUNK]
        logp = log_softmax(logits[i:i + len(targets)])
        out[i:i + len(targets)] = -logp[np.arange(len(targets)), targets]
    return out


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, std / sqrt(n); the error of a single value is nan."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def perplexity(nll: np.ndarray) -> tuple[float, float]:
    """exp(mean NLL) and its standard error by the delta method, ppl · std(NLL) / sqrt(n)."""
    mean, error = mean_and_error(nll)
    value = math.exp(mean) if mean < 709 else math.inf
    return value, value * error


class Scores:
    """Per-position values of one comparison, gathered window by window.

    A window whose package logits hold NaN or infinity is kept in the count (`nonfinite_windows`), its
    values are NaN, and every mean over windows then is NaN too: see `summary`.
    """

    def __init__(self):
        self.kl: list[np.ndarray] = []  # each [n - 1], nats
        self.kl_gap: list[np.ndarray] = []  # upper minus lower bound, when the KL is a lower bound
        self.kl_estimate: list[np.ndarray] = []  # the KL itself when it is exact
        self.nll: list[np.ndarray] = []
        self.nll_reference: list[np.ndarray] = []
        self.agree: list[np.ndarray] = []
        self.nonfinite = 0
        self.nonfinite_windows = 0

    def _add_nonfinite(self, logits: np.ndarray, positions: int, nll_reference: np.ndarray) -> bool:
        """Book a window of broken logits; False when all logits are finite."""
        bad = logits.size - int(np.isfinite(logits).sum())
        if not bad:
            return False
        self.nonfinite, self.nonfinite_windows = self.nonfinite + bad, self.nonfinite_windows + 1
        for values in (self.kl, self.nll, self.agree, self.kl_gap, self.kl_estimate):
            values.append(np.full(positions, np.nan))
        self.nll_reference.append(nll_reference)
        return True

    def add(self, reference: np.ndarray, package: np.ndarray, tokens: np.ndarray) -> None:
        """One window: logits of reference and package [n, vocab], token ids [n].

        KL(reference ‖ package) = Σ p (log p − log q) over the full vocabulary, in nats.
        """
        n = len(tokens) - 1
        nll_reference = token_nll(reference, tokens)
        if self._add_nonfinite(package, n, nll_reference):
            return
        kl, nll, agree = np.empty(n), np.empty(n), np.empty(n)
        for i in range(0, n, CHUNK):
            part = slice(i, min(i + CHUNK, n))
            logp, logq = log_softmax(reference[part]), log_softmax(package[part])
            kl[part] = np.einsum("ij,ij->i", np.exp(logp), logp - logq)
            nll[part] = -logq[np.arange(len(logq)), tokens[part.start + 1:part.stop + 1]]
            agree[part] = logp.argmax(-1) == logq.argmax(-1)
        self.kl.append(kl)
        self.kl_gap.append(np.zeros(n))
        self.kl_estimate.append(kl)
        self.nll.append(nll)
        self.nll_reference.append(nll_reference)
        self.agree.append(agree)

    def add_from_file(self, reference, window: int, package: np.ndarray) -> None:
        """One window against a reference file (`reference.Reference` or `kld_file.KldFile`), from its first scored
        position on."""
        tokens, package = reference.tokens[window, reference.first:], package[reference.first:]
        nll_reference = reference.nll[window].astype(np.float64)
        if self._add_nonfinite(package, len(tokens) - 1, nll_reference):
            return
        lower, gap, estimate, agree = reference.compare(window, package)
        self.kl.append(lower)
        self.kl_gap.append(gap)
        self.kl_estimate.append(estimate)
        self.nll.append(token_nll(package, tokens))
        self.nll_reference.append(nll_reference)
        self.agree.append(agree)

    @property
    def window_kl(self) -> np.ndarray:
        """Mean KL of each window, [windows]; NaN for a window with non-finite logits."""
        return np.array([values.mean() for values in self.kl])

    def summary(self) -> dict:
        """The report's numbers.

        With non-finite logits anywhere, `kl_*`, `ppl`, `top1` and their errors are None: an average over
        what is left would flatter a broken package. The same statistics over the finite windows are then
        found under `finite_windows`.
        """
        ppl, error = perplexity(np.concatenate(self.nll_reference))
        result = self._statistics([True] * len(self.kl)) if not self.nonfinite else dict.fromkeys(_KEYS)
        result |= {"ppl_reference": ppl, "ppl_reference_se": error}
        result |= {"nonfinite": self.nonfinite, "nonfinite_windows": self.nonfinite_windows}
        result |= {"windows": len(self.kl), "tokens": int(sum(map(len, self.kl)))}
        if self.nonfinite and self.nonfinite_windows < len(self.kl):
            finite = [bool(np.isfinite(values).all()) for values in self.nll]
            result["finite_windows"] = self._statistics(finite)
        return {key: _plain(value) for key, value in result.items()}

    def _statistics(self, keep: list[bool]) -> dict:
        def chosen(values):
            return np.concatenate([part for part, wanted in zip(values, keep, strict=True) if wanted])

        kl, gap = chosen(self.kl), chosen(self.kl_gap)
        numbers = [*mean_and_error(kl), *np.quantile(kl, [0.5, 0.9, 0.99]), kl.max(), (kl + gap).mean(),
                   *mean_and_error(chosen(self.kl_estimate)), *perplexity(chosen(self.nll))]
        top1 = chosen(self.agree).mean()
        numbers += [top1, math.sqrt(top1 * (1 - top1) / len(kl))]
        return dict(zip(_KEYS, map(_plain, numbers), strict=True))


_KEYS = ("kl_mean", "kl_se", "kl_median", "kl_p90", "kl_p99", "kl_max", "kl_upper_bound",
         "kl_estimate", "kl_estimate_se", "ppl", "ppl_se", "top1", "top1_se")


def _plain(value):
    """A JSON value: numpy numbers as Python's, nan and infinity as None."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


class Ratio(NamedTuple):
    """A ratio of means with a 95 % interval."""

    ratio: float
    low: float
    high: float


def paired_bootstrap(a: np.ndarray, b: np.ndarray, n: int = 10000, seed: int = 0) -> Ratio:
    """mean(a) / mean(b) with its percentile 95 % interval, resampling the pairs `n` times.

    a, b: one value per window, the same windows in the same order (Efron & Tibshirani 1993, ch. 13).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"paired values of at least two windows are needed, not {a.shape} and {b.shape}")
    rng = np.random.default_rng(seed)
    ratios = np.empty(n)
    for start in range(0, n, 1000):
        picks = rng.integers(0, len(a), (min(1000, n - start), len(a)))
        ratios[start:start + len(picks)] = a[picks].mean(1) / b[picks].mean(1)
    return Ratio(float(a.mean() / b.mean()), *map(float, np.quantile(ratios, [0.025, 0.975])))
