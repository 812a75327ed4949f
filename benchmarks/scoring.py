"""KL of a GGUF against the float model, window by window, and what can be said about a ratio of two.

The float model's log-probabilities are computed once, in torch and float32, and kept in a memory map
(windows × length × vocabulary × 4 bytes: 1.6 GB for 32 × 256 × 49152). Every arm is scored twice
against that one reference: its dequantised weights in the same torch forward pass, which measures the
weights alone, and its file in real llama.cpp, which rounds activations to 8 bits on top.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from optrot_edge.models import open_model
from optrot_edge.models.forward import final_hidden
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

ROWS = 32  # positions compared at once: 6 MB a temporary


def torch_logits(model: str | Path, windows: np.ndarray) -> Iterator[torch.Tensor]:
    """Float32 logits [length, vocab] of each window, from the dequantised weights."""
    source = open_model(str(model))
    hidden = final_hidden(source, torch.from_numpy(windows))
    head = source.lm_head(torch.float32)
    head = source.embedding(torch.float32) if head is None else head
    for window in hidden:
        yield F.linear(window, head)


def llama_logits(model: str | Path, windows: np.ndarray, threads: int) -> Iterator[torch.Tensor]:
    """Logits [length, vocab] of each window from llama.cpp on the CPU."""
    with LlamaCppBackend(model, windows.shape[1], n_batch=windows.shape[1], n_threads=threads) as backend:
        for logits in backend.iter_logits(windows):
            yield torch.from_numpy(logits)


class Reference:
    """The float model's log-probabilities on the evaluation windows, cached in `folder`."""

    def __init__(self, model: Path, windows: np.ndarray, folder: Path):
        self.windows = windows
        digest = hashlib.sha256(windows.tobytes()).hexdigest()[:12]
        path = folder / f"{model.stem}-{digest}-logprobs.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._compute(model, path)
        self.logprobs = np.load(path, mmap_mode="r")

    def _compute(self, model: Path, path: Path) -> None:
        partial = path.with_suffix(".partial")
        try:
            stored = None
            for index, logits in enumerate(torch_logits(model, self.windows)):
                if stored is None:
                    stored = np.lib.format.open_memmap(partial, "w+", np.float32,
                                                       (len(self.windows), *logits.shape))
                stored[index] = logits.log_softmax(-1).numpy()
            stored.flush()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @torch.no_grad()
    def score(self, logits: Iterator[torch.Tensor]) -> dict:
        """Per-window mean KL(reference ‖ arm) in nats, perplexity, top-1 agreement, bad values.

        All positions of a window count for KL and top-1, those with a next token for perplexity.
        """
        rows = []
        for index, arm in enumerate(logits):
            reference = torch.from_numpy(self.logprobs[index].copy())
            target = torch.from_numpy(np.append(self.windows[index][1:], -1))
            parts = [_compare(*part) for part in zip(arm.split(ROWS), reference.split(ROWS),
                                                     target.split(ROWS), strict=True)]
            rows.append(np.concatenate(parts, axis=1))
        kl, agree, nll, nonfinite = np.stack(rows, axis=1)  # each [windows, length]
        windows = kl.mean(1).tolist()
        return {"kl": float(kl.mean()), "kl_windows": windows, "ppl": float(np.exp(nll[:, :-1].mean())),
                "top1": float(agree.mean()), "nonfinite": int(nonfinite.sum())}


def _compare(arm: torch.Tensor, reference: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """KL, top-1 agreement, surprise at the target and count of bad values, float64 [4, rows].

    `arm` holds logits and `reference` log-probabilities [rows, vocab]; `target` [rows], -1 for none.
    """
    arm = arm.log_softmax(-1)
    kl = F.kl_div(arm, reference, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
    agree = arm.argmax(-1) == reference.argmax(-1)
    nll = -arm.gather(1, target.clamp_min(0)[:, None])[:, 0]
    nonfinite = (~arm.isfinite()).sum(-1)
    return torch.stack([kl, agree.double(), nll.double(), nonfinite.double()]).numpy()


def bootstrap_ratio(arms: np.ndarray, stock: np.ndarray, *, resamples: int = 10_000,
                    seed: int = 0) -> dict:
    """Ratio of mean KLs and its paired bootstrap 95 % interval.

    `arms` is [seeds, windows], `stock` [windows]. Each resample draws windows with replacement, the
    same ones for both sides, and, where there is more than one seed, seeds with replacement too.
    """
    rng = np.random.default_rng(seed)
    windows = rng.integers(len(stock), size=(resamples, len(stock)))
    seeds = rng.integers(len(arms), size=(resamples, len(arms)))
    # [resample, seed drawn, window drawn], one resample of seeds with one of windows
    drawn = arms[seeds[:, :, None], windows[:, None, :]].mean((1, 2))
    ratios = drawn / stock[windows].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"ratio": float(arms.mean() / stock.mean()), "low": float(low), "high": float(high)}


def standard_error(windows: list[float]) -> float:
    """Standard error of the mean of per-window values."""
    return float(np.std(windows, ddof=1) / len(windows) ** 0.5)
