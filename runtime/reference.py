"""Reference files: what a device needs to score a package without torch and the original model.

For every scored position (see `metrics`) the file keeps the reference's `k` most likely tokens with their
log-probabilities, the probability mass `t` of all other tokens (the tail), and the NLL of the target.

**Lower bound.** With the tail as one bucket,
    KL_trunc = Σ_{i in top k} p_i log(p_i / q_i) + t log(t / q_t) ≤ KL(p ‖ q),
by the log-sum inequality; q is the package's full distribution, q_t its mass on the same tail tokens.

**Upper bound.** What is missing is g = Σ_{tail} p_i log(p_i / q_i) − t log(t / q_t). Of the tail's p only
this is known: 0 ≤ p_i ≤ p_k, the smallest kept probability, and Σ p_i = t. g is convex in p, so over that
polytope it is largest at a vertex: m = ⌊t / p_k⌋ tokens at p_k, one more at r = t − m p_k, the rest at zero.
And −Σ p_i log q_i is largest when these are the tokens with the smallest q (rearrangement). Hence
    g ≤ Σ_{i ≤ m} p_k log(p_k / q_(i)) + r log(r / q_(m+1)) − t log(t / q_t),  q_(1) ≤ q_(2) ≤ … in the tail,
which some tail attains: nothing tighter follows from k, p_k and t. It is finite for finite logits, but loose:
the package's rarest tokens might hold the whole tail.
Log-probabilities are stored in float32, so both bounds hold up to about 1e-6 nats.

**Estimate.** The file also keeps `s` tail tokens per position, drawn with probability p_i / t by a seeded
generator. Σ_{top k} p_i log(p_i / q_i) + t · mean_j (log p_j − log q_j) is then an unbiased estimate of the
full KL; its standard error over positions covers the drawing too.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime.metrics import CHUNK, log_softmax, token_nll

FORMAT = "optrot-reference"
VERSION = 1
TAIL_SAMPLES = 8
_DTYPES = {"tokens": "<i4", "top_ids": "<i4", "top_logp": "<f4", "tail": "<f8", "tail_ids": "<i4",
           "tail_logp": "<f4", "nll": "<f4"}


class Comparison(NamedTuple):
    """Per scored position, float64 [n - 1]; see the module docstring."""

    lower: np.ndarray
    gap: np.ndarray  # upper bound minus lower bound
    estimate: np.ndarray
    agree: np.ndarray


@dataclass
class Reference:
    """A reference file in memory.

    tokens int32 [b, n]; top_ids int32 and top_logp float32 [b, n - 1, k], most likely first; tail float64
    and nll float32 [b, n - 1] (probability; nats); tail_ids, tail_logp [b, n - 1, s] drawn tokens.
    probe: a text and its ids in the reference's tokenizer. first: the first scored position of a window.
    """

    tokens: np.ndarray
    top_ids: np.ndarray
    top_logp: np.ndarray
    tail: np.ndarray
    tail_ids: np.ndarray
    tail_logp: np.ndarray
    nll: np.ndarray
    vocab_size: int
    model: str
    runtime: str
    text_sha256: str | None = None
    probe: dict | None = None
    truncated = True  # to the most likely tokens: the KL is a lower bound
    first = 0

    def compare(self, window: int, logits: np.ndarray) -> Comparison:
        """Window number `window` against the package's finite logits [n, vocab]."""
        n = self.top_ids.shape[1]
        lower, gap, estimate, agree = np.empty((4, n))
        for i in range(0, n, CHUNK):
            part = slice(i, min(i + CHUNK, n))
            logq = log_softmax(logits[part])
            ids, logp = self.top_ids[window, part], self.top_logp[window, part].astype(np.float64)
            tail = self.tail[window, part]
            lower[part], gap[part] = kl_bounds(ids, logp, tail, logq)
            head = (np.exp(logp) * (logp - np.take_along_axis(logq, ids, -1))).sum(-1)
            drawn = np.take_along_axis(logq, self.tail_ids[window, part], -1)
            estimate[part] = head + tail * (self.tail_logp[window, part] - drawn).mean(-1)
            agree[part] = logq.argmax(-1) == ids[:, 0]
        return Comparison(lower, gap, estimate, agree)


def kl_bounds(ids: np.ndarray, logp: np.ndarray, tail: np.ndarray, logq: np.ndarray):
    """Lower bound of KL(p ‖ q) and how far the upper bound lies above it (module docstring), [rows] each.

    ids, logp: the k most likely tokens of p, [rows, k]; tail: p's other mass [rows]; logq: [rows, vocab].
    """
    kept = np.take_along_axis(logq, ids, -1)
    lower = (np.exp(logp) * (logp - kept)).sum(-1)
    rest = logq.copy()
    np.put_along_axis(rest, ids, np.inf, -1)
    rest.sort(-1)
    size = logq.shape[1] - ids.shape[1]
    rest = rest[:, :size]  # log q of the tail tokens, rising
    gap = np.zeros(len(lower))
    for row in range(len(lower)):
        t, cap = tail[row], float(np.exp(logp[row].min()))
        if size == 0 or t <= 0:
            continue
        bucket = t * (np.log(t) - _log_sum_exp(rest[row]))
        count = min(int(t / cap), size)
        left = max(t - count * cap, 0.0)
        worst = cap * (count * np.log(cap) - rest[row, :count].sum())
        if left > 0 and count < size:
            worst += left * (np.log(left) - rest[row, count])
        lower[row] += bucket
        gap[row] = max(worst - bucket, 0.0)
    return lower, gap


def _log_sum_exp(rising: np.ndarray) -> float:
    return float(rising[-1] + np.log(np.exp(rising - rising[-1]).sum()))


def make_reference(backend, tokens: np.ndarray, *, top_k: int = 64, model_name: str | None = None,
                   text_sha256: str | None = None, probe: dict | None = None, seed: int = 0,
                   progress=None) -> Reference:
    """Score windows `tokens` [b, n] with `backend` and keep `top_k` tokens per position.

    seed: of the tokens drawn from the tail.

    Raises InputError for a window shorter than two tokens, or when the model gives non-finite logits.
    """
    tokens = np.ascontiguousarray(tokens, np.int32)
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise InputError(f"windows of at least two tokens are needed, not an array {list(tokens.shape)}")
    if not 1 <= top_k <= backend.vocab_size:
        raise InputError(f"top_k is {top_k}; it must lie between 1 and the vocabulary, {backend.vocab_size}")
    shape = (len(tokens), tokens.shape[1] - 1)
    ids, logp = np.empty((*shape, top_k), np.int32), np.empty((*shape, top_k), np.float32)
    tail, nll = np.empty(shape), np.empty(shape, np.float32)
    drawn = np.empty((*shape, TAIL_SAMPLES), np.int32)
    drawn_logp = np.empty(drawn.shape, np.float32)
    rng = np.random.default_rng(seed)
    for b, logits in enumerate(backend.iter_logits(tokens, progress=progress)):
        check_finite(logits, b, backend.name)
        nll[b] = token_nll(logits, tokens[b])
        for i in range(0, shape[1], CHUNK):
            part = slice(i, min(i + CHUNK, shape[1]))
            full = log_softmax(logits[part])
            ids[b, part], logp[b, part], rest = _truncate(full, top_k)
            tail[b, part], drawn[b, part] = rest.sum(-1), _draw(rest, rng)
            drawn_logp[b, part] = np.take_along_axis(full, drawn[b, part], -1)
    return Reference(tokens, ids, logp, tail, drawn, drawn_logp, nll, backend.vocab_size,
                     model_name or backend.name, f"{backend.runtime} ({backend.version})", text_sha256, probe)


def check_finite(logits: np.ndarray, window: int, name: str) -> None:
    """InputError if the reference's own logits are not all finite."""
    if not np.isfinite(logits).all():
        raise InputError(f"the reference {name} gives non-finite logits in window {window}; "
                         "it cannot serve as a reference")


def _truncate(logp: np.ndarray, k: int):
    ids = np.argpartition(-logp, k - 1, axis=-1)[:, :k] if k < logp.shape[1] else np.argsort(-logp, -1)
    kept = np.take_along_axis(logp, ids, -1)
    order = np.lexsort((ids, -kept), axis=-1)  # ties: lowest id first, as argmax does
    ids, kept = np.take_along_axis(ids, order, -1), np.take_along_axis(kept, order, -1)
    rest = np.exp(logp)
    np.put_along_axis(rest, ids, 0.0, -1)
    return ids, kept, rest


def _draw(rest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """TAIL_SAMPLES ids per row of `rest` [rows, vocab], with probability proportional to its entries."""
    total = np.cumsum(rest, -1)
    level = rng.random((len(rest), TAIL_SAMPLES)) * total[:, -1:]
    ids = np.stack([np.searchsorted(t, u, side="right") for t, u in zip(total, level, strict=True)])
    return np.minimum(ids, rest.shape[1] - 1)  # an empty tail gives any token, with weight zero


def write_reference(path: str | Path, backend, tokens: np.ndarray, **options) -> Reference:
    """`make_reference(backend, tokens, **options)` into `path`, gzip-compressed if it ends in .gz.

    Arrays are little-endian, base64 inside JSON. 32 windows of 256 tokens at k = 64 take 6.4 MB, or about
    4 MB compressed.
    """
    reference = make_reference(backend, tokens, **options)
    save_reference(path, reference)
    return reference


def save_reference(path: str | Path, reference: Reference) -> None:
    """Write atomically; InputError when the path cannot be written."""
    path = Path(path)
    data = {"format": FORMAT, "version": VERSION, "model": reference.model, "runtime": reference.runtime,
            "vocab_size": reference.vocab_size, "text_sha256": reference.text_sha256,
            "probe": reference.probe, "arrays": {}}
    for name, dtype in _DTYPES.items():
        array = getattr(reference, name)
        packed = base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")
        data["arrays"][name] = {"dtype": dtype, "shape": list(array.shape), "base64": packed}
    payload = json.dumps(data, allow_nan=False).encode()
    if path.name.endswith(".gz"):
        payload = gzip.compress(payload, 6, mtime=0)
    write_atomically(path, payload)


@contextlib.contextmanager
def whole_file(path: Path):
    """A handle to write beside `path`, renamed at the end, so that no half-written file is left. Raises InputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as handle:
                yield handle
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_atomically(path: Path, payload: bytes) -> None:
    """Write `payload` as the whole file `path`, or nothing. Raises InputError."""
    with whole_file(path) as handle:
        handle.write(payload)


def read_reference(path: str | Path) -> Reference:
    """Read and check a reference file. Raises InputError."""
    path = Path(path)
    try:
        payload = path.read_bytes()
        if payload[:2] == b"\x1f\x8b":
            payload = gzip.decompress(payload)
        data = json.loads(payload)
    except FileNotFoundError:
        raise InputError(f"{path}: no such reference file") from None
    except (OSError, EOFError, ValueError, RecursionError) as error:  # BadGzipFile is an OSError
        raise InputError(f"{path}: not a readable reference file: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{path}: not a reference file; write one with `optrot-edge reference`")
    if data.get("version") != VERSION:
        raise InputError(f"{path}: reference version {data.get('version')!r}, this program reads {VERSION}")
    try:
        arrays = {name: _unpack(data["arrays"][name], dtype) for name, dtype in _DTYPES.items()}
        reference = Reference(**arrays, vocab_size=int(data["vocab_size"]), model=str(data["model"]),
                              runtime=str(data["runtime"]), text_sha256=data.get("text_sha256"),
                              probe=data.get("probe"))
        _validate(reference)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: damaged reference file: {error}; write it again") from None
    return reference


def _unpack(entry: dict, dtype: str) -> np.ndarray:
    if entry["dtype"] != dtype:
        raise ValueError(f"dtype {entry['dtype']!r}, expected {dtype!r}")
    raw = base64.b64decode(entry["base64"], validate=True)
    return np.frombuffer(raw, dtype).reshape(entry["shape"])


def _validate(r: Reference) -> None:
    if r.tokens.ndim != 2 or r.tokens.shape[1] < 2 or not len(r.tokens):
        raise ValueError(f"tokens of shape {list(r.tokens.shape)}")
    positions = (r.tokens.shape[0], r.tokens.shape[1] - 1)
    k = r.top_ids.shape[-1]
    if not r.top_ids.shape == r.top_logp.shape == (*positions, k) or not 1 <= k <= r.vocab_size:
        raise ValueError("the top-k arrays do not fit the tokens")
    if r.tail.shape != positions or r.nll.shape != positions:
        raise ValueError("tail or nll does not fit the tokens")
    if r.tail_ids.shape != r.tail_logp.shape or r.tail_ids.shape[:-1] != positions or not r.tail_ids.size:
        raise ValueError("the drawn tail tokens do not fit the tokens")
    for ids in (r.tokens, r.top_ids, r.tail_ids):
        if not 0 <= ids.min() <= ids.max() < r.vocab_size:
            raise ValueError("token ids outside the vocabulary")
    if (np.diff(np.sort(r.top_ids, -1), axis=-1) == 0).any():
        raise ValueError("a token occurs twice among the top k")
    mass = np.exp(r.top_logp.astype(np.float64)).sum(-1) + r.tail
    if not (np.isfinite(r.top_logp).all() and (r.tail >= 0).all() and (np.abs(mass - 1) < 1e-4).all()
            and np.isfinite(r.tail_logp).all() and np.isfinite(r.nll).all() and (r.nll >= 0).all()):
        raise ValueError("the probabilities do not sum to one")
    if r.probe is not None and not (isinstance(r.probe["text"], str) and isinstance(r.probe["ids"], list)):
        raise ValueError("probe")
