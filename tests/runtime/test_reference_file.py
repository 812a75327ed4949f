"""Reference files: round trip, damage, and the two bounds around the full KL."""

import gzip
import json
import math

import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.metrics import Scores, log_softmax
from optrot_edge.runtime.reference import kl_bounds, make_reference, read_reference, write_reference


class Given:
    """A backend whose logits are given."""

    runtime, version, name = "given", "0", "given"

    def __init__(self, logits):
        self.values, self.vocab_size = logits, logits.shape[-1]

    def iter_logits(self, tokens, *, progress=None):
        yield from self.values


def random_case(scale, noise, vocab=211, seed=0):
    rng = np.random.default_rng(seed)
    reference = (scale * rng.standard_normal((2, 40, vocab))).astype(np.float32)
    package = (reference + noise * rng.standard_normal(reference.shape)).astype(np.float32)
    return reference, package, rng.integers(0, vocab, (2, 40)).astype(np.int32)


def full_kl(reference, package):
    logp, logq = log_softmax(reference[:-1]), log_softmax(package[:-1])
    return (np.exp(logp) * (logp - logq)).sum(-1)


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("top_k", [1, 4, 64, 210, 211])
def test_bounds_enclose_full_kl(scale, noise, top_k):
    logits, package, tokens = random_case(scale, noise)
    reference = make_reference(Given(logits), tokens, top_k=top_k)
    for window in range(2):
        lower, gap, _, agree = reference.compare(window, package[window])
        exact = full_kl(logits[window], package[window])
        assert (gap >= 0).all()
        assert (lower <= exact + 2e-6).all()
        assert (exact <= lower + gap + 2e-6).all()
        if top_k >= 210:  # nothing, or a single token, is in the tail
            np.testing.assert_allclose(lower, exact, atol=2e-6)
        expected = logits[window, :-1].argmax(-1) == package[window, :-1].argmax(-1)
        assert (agree == expected).all()


def test_lower_bound_grows_and_gap_shrinks_with_k():
    logits, package, tokens = random_case(3.0, 1.0)
    lowers, uppers = [], []
    for top_k in (1, 2, 8, 32, 128, 211):
        lower, gap, *_ = make_reference(Given(logits), tokens, top_k=top_k).compare(0, package[0])
        lowers.append(lower)
        uppers.append(lower + gap)
    assert all((b >= a - 2e-6).all() for a, b in zip(lowers, lowers[1:], strict=False))
    assert all((b <= a + 2e-6).all() for a, b in zip(uppers, uppers[1:], strict=False))


def test_upper_bound_is_attained():
    """The worst tail p: the smallest q's filled to p_k one after another. No larger KL fits the numbers."""
    rng = np.random.default_rng(3)
    logq = log_softmax(rng.standard_normal((1, 30)) * 2)
    ids = np.array([[0, 1, 2]])
    kept, tail = np.array([[0.5, 0.2, 0.08]]), np.array([0.22])
    lower, gap = kl_bounds(ids, np.log(kept), tail, logq)
    p = np.zeros(30)
    p[:3] = kept[0]
    order = 3 + np.argsort(logq[0, 3:])
    p[order[:2]], p[order[2]] = 0.08, 0.06
    exact = sum(x * (math.log(x) - logq[0, i]) for i, x in enumerate(p) if x > 0)
    assert lower[0] + gap[0] == pytest.approx(exact, abs=1e-12)
    for _ in range(200):  # any other admissible tail stays below
        other = rng.dirichlet(np.full(27, 0.3)) * 0.22
        if other.max() > 0.08:
            continue
        p[3:] = other
        exact = sum(x * (math.log(x) - logq[0, i]) for i, x in enumerate(p) if x > 0)
        assert lower[0] - 1e-12 <= exact <= lower[0] + gap[0] + 1e-12


@pytest.mark.parametrize("top_k", [1, 20, 211])
def test_estimate_is_unbiased(top_k):
    logits, package, tokens = random_case(1.5, 1.0)
    exact = full_kl(logits[0], package[0]).mean()
    references = (make_reference(Given(logits), tokens, top_k=top_k, seed=seed) for seed in range(200))
    estimates = [reference.compare(0, package[0]).estimate.mean() for reference in references]
    error = np.std(estimates, ddof=1) / math.sqrt(200)
    assert abs(np.mean(estimates) - exact) < 4 * error + 1e-6
    assert (error < 1e-6) == (top_k == 211)


@pytest.mark.parametrize("name", ["ref.json", "ref.json.gz"])
def test_round_trip(tmp_path, name):
    logits, _, tokens = random_case(2.0, 0.0)
    probe = {"text": "a b", "ids": [1, 2]}
    written = write_reference(tmp_path / name, Given(logits), tokens, top_k=5, model_name="m",
                              text_sha256="ab", probe=probe)
    read = read_reference(tmp_path / name)
    for key in ("tokens", "top_ids", "top_logp", "tail", "tail_ids", "tail_logp", "nll"):
        np.testing.assert_array_equal(getattr(read, key), getattr(written, key))
    assert (read.model, read.text_sha256, read.probe, read.vocab_size) == ("m", "ab", probe, 211)
    assert not list(tmp_path.glob("*.partial"))
    logp = log_softmax(logits[0, :-1])
    order = np.sort(logp, -1)[:, ::-1]
    np.testing.assert_allclose(read.top_logp[0], order[:, :5], atol=1e-6)
    np.testing.assert_allclose(read.tail[0], np.exp(order[:, 5:]).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(read.nll[0], -logp[np.arange(39), tokens[0, 1:]], rtol=1e-6)


def test_real_logits_are_enclosed_and_compact(tmp_path, tiny, noisy):
    tokens = np.random.default_rng(0).integers(0, 261, (3, 100)).astype(np.int32)
    with LlamaCppBackend(tiny) as original, LlamaCppBackend(noisy) as package:
        reference = write_reference(tmp_path / "r.json.gz", original, tokens, top_k=16)
        exact, truncated = Scores(), Scores()
        pairs = zip(original.iter_logits(tokens), package.iter_logits(tokens), strict=True)
        for b, (p, q) in enumerate(pairs):
            exact.add(p, q, tokens[b])
            truncated.add_from_file(reference, b, q)
    full, bounded = exact.summary(), truncated.summary()
    assert bounded["kl_mean"] < full["kl_mean"] < bounded["kl_upper_bound"]
    assert bounded["kl_estimate"] == pytest.approx(full["kl_mean"], abs=3 * bounded["kl_estimate_se"])
    for key in ("ppl", "top1", "tokens", "windows"):
        assert bounded[key] == pytest.approx(full[key], rel=1e-9), key
    assert bounded["ppl_reference"] == pytest.approx(full["ppl_reference"], rel=1e-6)
    assert (tmp_path / "r.json.gz").stat().st_size < 3 * 99 * (16 + 8) * 12


def damaged(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("edit", [
    lambda d: d.update(format="other"),
    lambda d: d.update(version=9),
    lambda d: d.update(vocab_size=20),
    lambda d: d.pop("arrays"),
    lambda d: d["arrays"].pop("tail"),
    lambda d: d["arrays"]["tail_ids"].update(shape=[2, 39, 2, 4]),
    lambda d: d["arrays"]["tail"].update(shape=[2, 38]),
    lambda d: d["arrays"]["top_ids"].update(base64="!!"),
    lambda d: d["arrays"]["top_logp"].update(dtype="<f8"),
    lambda d: d["arrays"].update(top_logp=d["arrays"]["top_ids"] | {"dtype": "<f4"}),
    lambda d: d["arrays"].update(tail=[1]),
    lambda d: d.update(probe={"text": 1}),
])
def test_damage_is_an_input_error(tmp_path, edit):
    logits, _, tokens = random_case(2.0, 0.0)
    path = tmp_path / "ref.json"
    write_reference(path, Given(logits), tokens, top_k=5)
    damaged(path, edit)
    with pytest.raises(InputError):
        read_reference(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="no such"):
        read_reference(tmp_path / "none.json")
    path = tmp_path / "ref.json.gz"
    logits, _, tokens = random_case(2.0, 0.0)
    write_reference(path, Given(logits), tokens, top_k=5)
    whole = path.read_bytes()
    for content in (whole[:-20], b"", b"{", b"[1]", gzip.compress(b"\xff\xfe")):
        path.write_bytes(content)
        with pytest.raises(InputError):
            read_reference(path)
    with pytest.raises(InputError, match="cannot write"):
        write_reference(tmp_path / "ref.json.gz" / "x.json", Given(logits), tokens, top_k=5)


def test_unusable_requests():
    logits, _, tokens = random_case(2.0, 0.0)
    with pytest.raises(InputError, match="top_k"):
        make_reference(Given(logits), tokens, top_k=212)
    with pytest.raises(InputError, match="windows"):
        make_reference(Given(logits), tokens[:, :1])
    logits[1, 3, 3] = np.nan
    with pytest.raises(InputError, match="non-finite logits in window 1"):
        make_reference(Given(logits), tokens)
