"""A package against its original: the report that says what was lost."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime import backends
from optrot_edge.runtime.kld_file import SUFFIX, KldFile, cut_chunks, is_kld, read_kld, text_tokens, write_kld
from optrot_edge.runtime.metrics import Scores
from optrot_edge.runtime.reference import (
    Reference,
    check_finite,
    read_reference,
    write_atomically,
    write_reference,
)
from optrot_edge.runtime.text import (
    DEFAULT_WINDOWS,
    PROBE,
    GgufTokenizer,
    cut_windows,
    open_tokenizer,
    text_sha256,
)

LARGEST_REPORT = 2**26  # bytes; no report is that large


def evaluate_package(package: str | Path, *, reference: str | Path, text: str | None = None,
                     windows: int | None = None, window: int | None = None, backend: str | None = None,
                     reference_backend: str | None = None, device: str = "cpu", speed: bool = True,
                     kv_bits: int | None = None, trust_remote_code: bool = False, accuracy_level: int | None = None,
                     kv_type: str | None = None, kv_rotation: bool = True, activations: int | None = None,
                     progress=None) -> dict:
    """Score `package` (a .gguf, an MLX or ONNX folder or a checkpoint folder) against `reference`.

    reference: a model (.gguf, Hugging Face or MLX folder, checkpoint) or a reference file (.json, .json.gz, or one of
    llama-perplexity's, see `kld_file`). text: the evaluation text; optional with a reference file, which holds its
    windows. windows, window: how many (default: all there are, at most 32) of how many tokens (default 256). backend,
    reference_backend: "llama.cpp", "mlx", "onnxruntime" or "torch", default by kind. speed: also time the runtime.
    kv_bits: 4 or 8, keep an MLX package's keys and values in so many bits. trust_remote_code: run the model files that
    MLX folders bring. accuracy_level: run an ONNX package at this one (see `OnnxBackend`). kv_type, kv_rotation: the
    KV cache of a GGUF (see `KvCache.parse`). activations: bits that what runs in torch rounds the package's
    activations to (see `TorchBackend`). progress: called with (done, total, what).

    The package's own tokenizer cuts the text; BOS begins every window if the package adds BOS. KL is in nats.
    `kl_is_lower_bound` is true against a reference file: the KL then lies between `kl_mean` and
    `kl_upper_bound`, and `kl_estimate` ± `kl_estimate_se` estimates it without bias (see `reference`).
    With non-finite logits the means are null (see `Scores.summary`).
    Raises InputError for unusable input: missing files, a short text, windows longer than the context,
    tokenizers that disagree.
    """
    began = time.perf_counter()
    reference = backends.local_path(reference)
    from_file = backends.kind_of(reference) == "reference"
    with backends.open_package(package, backend, device, kv_bits=kv_bits, trust_remote_code=trust_remote_code,
                               accuracy_level=accuracy_level, kv_type=kv_type, kv_rotation=kv_rotation,
                               activations=activations) as runner:
        if from_file:
            stored = read_kld(reference) if is_kld(reference) else read_reference(reference)
            chosen = _windows_of(stored, package, runner, text, windows, window)
            scores = _score_against_file(runner, stored, chosen, progress)
            source, used = f"{stored.model} (from {Path(reference).name})", stored.runtime
            count, length = len(chosen), stored.tokens.shape[1]
        else:
            tokens = tokenize_for(package, reference, text, window, windows)
            with backends.open_reference(reference, reference_backend, device,
                                         trust_remote_code=trust_remote_code, beside_package=True) as original:
                _same_vocabulary(runner, original.vocab_size, original.name)
                _fits(runner, tokens), _fits(original, tokens)
                scores = score_windows(runner, original, tokens, progress)
                source, used = original.name, f"{original.runtime} ({original.version})"
            count, length = tokens.shape
        report, bounds = scores.summary(), from_file and stored.truncated
        if not bounds:  # the KL is exact
            for part in (report, report.get("finite_windows", {})):
                for key in ("kl_upper_bound", "kl_estimate", "kl_estimate_se"):
                    part.pop(key, None)
        report |= {"kl_is_lower_bound": bounds, "window": length, "window_kl": _listed(scores.window_kl)}
        report |= {"package": Path(package).name, "reference": source, "reference_runtime": used,
                   "runtime": f"{runner.runtime} ({runner.version})", "device": device,
                   "text_sha256": text_sha256(text) if text else stored.text_sha256}
        if from_file and stored.first:
            report["first_position"] = stored.first  # of those scored in every window
        if kv_bits is not None:
            report["kv_bits"] = kv_bits
        if kv_type is not None:
            report |= {"kv_type": kv_type, "kv_rotation": runner.kv_cache.rotated}
        if activations is not None:
            report["activations"] = activations
        if getattr(runner, "accuracy_level", None) is not None:
            report["accuracy_level"] = runner.accuracy_level
        report |= _speed(runner, speed)
    report |= {"bytes": backends.size_on_disk(package), "bits_per_weight": backends.bits_per_weight(package)}
    return report | {"seconds": time.perf_counter() - began}


def check_report_place(path: str | Path) -> None:
    """InputError, before anything is measured, when `path` is there and holds anything but a report."""
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return
    found = None
    if path.stat().st_size < LARGEST_REPORT:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "kl_mean" not in found:
        raise InputError(f"{path} exists and is no report of an evaluation; choose another --out")


def write_report(path: str | Path, report: dict) -> None:
    """Write the report as JSON, atomically. Raises InputError when the path cannot be written."""
    write_atomically(Path(path), (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def write_reference_file(model: str | Path, out: str | Path, *, text: str, windows: int | None = None,
                         window: int | None = None, top_k: int | None = None, backend: str | None = None,
                         device: str = "cpu", trust_remote_code: bool = False, progress=None) -> Reference | KldFile:
    """Score `text` with `model` and write a reference file. Arguments as in `evaluate_package`.

    top_k: log-probabilities kept per position, by default 64. A file whose name ends in .kld is llama-perplexity's
    (see `kld_file`): all log-probabilities of the second halves of consecutive chunks from the text's beginning on, of
    512 tokens by default.
    """
    model = backends.local_path(model)
    if Path(out).suffix == SUFFIX:
        if top_k is not None:
            raise InputError(f"{out}: a {SUFFIX} file holds all log-probabilities; leave --top-k out, or write a .json")
        return _write_kld(model, out, text, window, windows, backend, device, trust_remote_code, progress)
    if not Path(out).name.endswith((".json", ".json.gz")):
        raise InputError(f"{out}: the name of a reference file ends in .json, .json.gz or {SUFFIX}")
    tokens = tokenize_for(model, None, text, window, windows)
    tokenizer = open_tokenizer(model)
    probe = {"text": PROBE, "ids": tokenizer.tokenize(PROBE)}
    tokenizer.close()
    with backends.open_reference(model, backend, device, trust_remote_code=trust_remote_code) as original:
        _fits(original, tokens)
        return write_reference(out, original, tokens, top_k=64 if top_k is None else top_k,
                               text_sha256=text_sha256(text), probe=probe, progress=progress)


def _write_kld(model, out, text: str, window, windows, backend, device, trust_remote_code, progress) -> KldFile:
    tokenizer = open_tokenizer(model)
    tokens = cut_chunks(text_tokens(tokenizer, text), window, windows, DEFAULT_WINDOWS)
    bos = tokenizer.bos if tokenizer.adds_bos else None
    tokenizer.close()
    with backends.open_reference(model, backend, device, trust_remote_code=trust_remote_code) as original:
        _fits(original, tokens)
        return write_kld(out, original, tokens, bos=bos, progress=progress)


def tokenize_for(package: str | Path, reference: str | Path | None, text: str | None, window: int | None,
                 windows: int | None) -> np.ndarray:
    """Windows int32 [b, window] of `text` in the package's tokenizer.

    Raises InputError when the reference's tokenizer splits the text otherwise, or when of two GGUFs one
    adds BOS and the other does not.
    """
    if text is None or not text.strip():
        raise InputError("the evaluation text is empty; pass a UTF-8 text file with --text")
    text_sha256(text)  # refuses what cannot be encoded, before a tokenizer sees it
    tokenizer = open_tokenizer(package)
    ids = tokenizer.tokenize(text)
    bos = tokenizer.bos if tokenizer.adds_bos else None
    tokenizer.close()
    if reference is not None:
        other = open_tokenizer(reference)
        _same_ids(ids, other.tokenize(text), package, reference)
        if isinstance(tokenizer, GgufTokenizer) and isinstance(other, GgufTokenizer):
            _same_bos(tokenizer, other)
        other.close()
    return cut_windows(ids, window, windows, bos=bos)


def _same_ids(ours: list[int], theirs: list[int], package, reference) -> None:
    if ours == theirs:
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    raise InputError(f"the tokenizers of {Path(package).name} and {Path(reference).name} disagree from token "
                     f"{at} on ({ours[at:at + 3]} against {theirs[at:at + 3]}); the package's tokenizer is "
                     "wrong, or this is another model's reference")


def _same_bos(ours: GgufTokenizer, theirs: GgufTokenizer) -> None:
    if (ours.adds_bos, ours.bos) != (theirs.adds_bos, theirs.bos):
        raise InputError(f"the package's BOS (id {ours.bos}, added: {ours.adds_bos}) is not the reference's "
                         f"(id {theirs.bos}, added: {theirs.adds_bos}); export the tokenizer again")


def _same_vocabulary(runner, size: int, name: str) -> None:
    if runner.vocab_size != size:
        raise InputError(f"the package has {runner.vocab_size} tokens and the reference {name} has {size}; "
                         "they are not the same model")


def _fits(backend, tokens: np.ndarray) -> None:
    if tokens.shape[1] > backend.context_length:
        raise InputError(f"a window of {tokens.shape[1]} tokens is longer than the context of "
                         f"{backend.context_length} tokens of {backend.name}; use a shorter --window")


def _windows_of(stored: Reference | KldFile, package, runner, text: str | None, windows: int | None,
                window: int | None) -> list[int]:
    """Indices of the reference file's windows to use, after checking that package and text fit it."""
    count, length = stored.tokens.shape
    if window not in (None, length):
        raise InputError(f"the reference file holds windows of {length} tokens, not {window}")
    if windows is not None and not 1 <= windows <= count:
        raise InputError(f"the reference file holds {count} windows; {windows} were asked for")
    _same_vocabulary(runner, stored.vocab_size, stored.model)
    _fits(runner, stored.tokens)
    if isinstance(stored, KldFile):
        tokenizer = open_tokenizer(package)
        stored.adopt(tokenizer, text)
        tokenizer.close()
    else:
        _same_text(stored, package, text)
    return np.linspace(0, count - 1, windows or count).astype(int).tolist()


def _same_text(stored: Reference, package, text: str | None) -> None:
    if text is not None and stored.text_sha256 is not None and text_sha256(text) != stored.text_sha256:
        raise InputError("the reference file was written from another text; leave --text out, or give that "
                         "text")
    if stored.probe is not None:
        tokenizer = open_tokenizer(package)
        _same_ids(tokenizer.tokenize(stored.probe["text"]), stored.probe["ids"], package, stored.model)
        tokenizer.close()


def score_windows(runner, original, tokens: np.ndarray, progress=None) -> Scores:
    """Scores of the open backend `runner` against the open backend `original` on windows [b, n] of token ids.

    Raises InputError when the original yields non-finite logits.
    """
    scores = Scores()
    pairs = zip(original.iter_logits(tokens, progress=progress),
                runner.iter_logits(tokens, progress=progress), strict=True)
    for index, (expected, got) in enumerate(pairs):
        check_finite(expected, index, original.name)
        scores.add(expected, got, tokens[index])
        if progress:
            progress(index + 1, len(tokens), "windows")
    return scores


def _score_against_file(runner, stored: Reference | KldFile, chosen: list[int], progress) -> Scores:
    scores = Scores()
    for done, got in enumerate(runner.iter_logits(stored.tokens[chosen], progress=progress)):
        scores.add_from_file(stored, chosen[done], got)
        if progress:
            progress(done + 1, len(chosen), "windows")
    return scores


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _speed(runner, wanted: bool) -> dict:
    measured = wanted and hasattr(runner, "speed")
    return runner.speed() if measured else {"prefill_tokens_per_s": None, "decode_tokens_per_s": None}
