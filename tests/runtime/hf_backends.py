"""What every backend with a Hugging Face tokenizer keeps to: lengths, and the report."""

from __future__ import annotations

import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.runtime.backends import bits_per_weight, size_on_disk
from optrot_edge.runtime.evaluate import evaluate_package
from optrot_edge.runtime.metrics import Scores
from optrot_edge.runtime.text import cut_windows
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.runtime.byte_llama import TEXT


def refuses_what_does_not_fit(backend_class, folder) -> None:
    """`folder` holds the tiny "llama": 256 tokens of context, 512 of vocabulary."""
    with backend_class(folder) as backend:
        assert backend.logits(np.zeros(256, int)).shape == (256, 512)
        for tokens, match in ((np.zeros(257, int), "context"), ([512], "token ids"), ([-1], "token ids"),
                              ([], "no tokens"), ([[1]], "one sequence")):
            with pytest.raises(InputError, match=match):
                backend.logits(tokens)
        with pytest.raises(InputError, match="context"):
            backend.generate([1], 256)
        with pytest.raises(InputError, match="no tokens"):
            backend.generate([], 3)
    with backend_class(folder, n_ctx=10) as backend, pytest.raises(InputError, match="context of 10"):
        backend.logits(np.zeros(11, int))
    with pytest.raises(InputError, match="n_ctx is 0"):
        backend_class(folder, n_ctx=0)


def report_by_hand(backend_class, source, folder) -> dict:
    """The report of a 4-bit package of the tiny "llama3_rope" against `source`, compared with scores by hand."""
    report = evaluate_package(folder, reference=source, text=TEXT, windows=2, window=48)
    assert report["reference_runtime"].startswith("torch")
    assert report["bytes"] == size_on_disk(folder) and report["bits_per_weight"] == bits_per_weight(folder)
    with TorchBackend(source) as a, backend_class(folder) as b:  # this tokenizer adds BOS
        tokens = cut_windows(b.tokenize(TEXT, add_bos=False), 48, 2, bos=507)
        scores = Scores()
        for p, q, window in zip(a.iter_logits(tokens), b.iter_logits(tokens), tokens, strict=True):
            scores.add(p, q, window)
    expected = scores.summary()
    for key in ("kl_mean", "kl_p99", "ppl", "ppl_reference", "top1"):
        assert report[key] == pytest.approx(expected[key], rel=1e-4), key
    assert report["kl_mean"] > 0.01 and report["decode_tokens_per_s"] > 1
    return report
