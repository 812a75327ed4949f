"""Calibration text as the road needs it: windows of tokens, and what the float model makes of them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.journal import sha256
from optrot_edge.memory import must_spill
from optrot_edge.recipe import Recipe

SENSITIVITY_TOKENS = 2048
Progress = Callable[[str, int, int, str], None]  # stage, done, total, note


def check_windows(source, recipe: Recipe) -> None:
    """InputError when a calibration window is longer than the model's context, or all are too few to learn from."""
    if recipe.calibration != "none" and recipe.seqlen > source.config.max_position_embeddings:
        raise InputError(f"--seqlen {recipe.seqlen} exceeds the model's context of "
                         f"{source.config.max_position_embeddings} tokens")
    if recipe.rotation in ("optrot+", "auto"):
        from optrot_edge.rotations.covariance import check_tokens

        check_tokens(recipe.nsamples * recipe.seqlen, source.config.hidden_size, warn=False)


def calibration_windows(source, recipe: Recipe, extra: int = 0):
    """Calibration tokens [nsamples + extra + fresh, seqlen] (torch int64) and the SHA-256 of their text.

    After the recipe's `nsamples` come the `extra` windows that "auto" keeps apart and those that distillation learns
    from: as many as `nsamples`, or what the text has left, at least an eighth of that.
    """
    import torch

    from optrot_edge.quantize.calibration import load_text, sample_windows, text_hash
    from optrot_edge.runtime.text import open_tokenizer

    check_windows(source, recipe)
    text = load_text(recipe.calibration)
    tokenizer = open_tokenizer(source.path)
    ids, bos = tokenizer.tokenize(text), tokenizer.bos if tokenizer.adds_bos else None
    tokenizer.close()
    if max(ids, default=0) >= source.config.vocab_size:
        raise InputError("the tokenizer yields ids beyond the model's vocabulary; they do not belong together")
    try:
        windows = sample_windows(ids, recipe.nsamples, recipe.seqlen, recipe.seed, bos, more=extra,
                                 spare=recipe.nsamples if recipe.distill else 0)
    except InputError as error:
        if not extra:
            raise
        raise InputError(f"{error} (--rotation auto keeps {extra} of them apart to judge by)") from None
    fresh, needed = len(windows) - recipe.nsamples - extra, max(2, recipe.nsamples // 8)
    if recipe.distill and fresh < needed:
        raise InputError(f"--distill learns from windows that were not calibrated on: the text has {fresh} left, and "
                         f"{needed} are needed. Give a longer text (--calibration), or lower --nsamples")
    return torch.from_numpy(windows), text_hash(text)


class CalibrationInputs:
    """Tokens and statistics of one model and recipe, each computed when first asked for.

    `held_out` windows are drawn besides the recipe's `nsamples`, which stay the same, and never calibrated on.
    Covariances are kept in `folder` until `close`, or the end of a `with` block; `covariances` collected before,
    on the same tokens, are used and left alone.
    Raises InputError as `calibration_windows` and `collect` do.
    """

    def __init__(self, source, recipe: Recipe, device: str, folder: str | Path | None = None, *,
                 held_out: int = 0, covariances=None, progress: Progress | None = None):
        self.source, self.recipe, self.device, self.folder = source, recipe, device, folder
        self.extra = held_out
        self.progress = progress or (lambda *_: None)
        self._covariances, self._borrowed = covariances, covariances is not None

    def __enter__(self) -> CalibrationInputs:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Delete what was kept on disk."""
        if self._covariances is not None and not self._borrowed:
            self._covariances.close()
            self._covariances = None

    @functools.cached_property
    def _windows(self):
        if self.recipe.calibration == "none":
            return None, None, None, None
        tokens, sha = calibration_windows(self.source, self.recipe, self.extra)
        first, last = self.recipe.nsamples, self.recipe.nsamples + self.extra
        return tokens[:first], tokens[first:last], tokens[last:], sha

    @property
    def tokens(self):
        """Windows [nsamples, seqlen] to calibrate on; None for calibration "none"."""
        return self._windows[0]

    @property
    def held_out(self):
        """Windows [held_out, seqlen] to judge on."""
        return self._windows[1]

    @property
    def fresh(self):
        """Windows [fresh, seqlen] to distil on; none without the recipe's `distill`."""
        return self._windows[2]

    @property
    def text_sha256(self) -> str | None:
        """SHA-256 of the calibration text."""
        return self._windows[3]

    @property
    def scratch(self) -> Path | None:
        """The folder in which activations are kept when memory is short; None to keep them in memory."""
        if not must_spill(self.source.config, self.recipe):
            return None
        return Path(self.folder or tempfile.gettempdir())

    @property
    def covariances(self):
        """Input covariances of the float model, see `optrot_edge.rotations.covariance`."""
        from optrot_edge.rotations.covariance import collect

        if self._covariances is None:
            self._covariances = collect(
                self.source, self.tokens, device=self.device, folder=self.folder, scratch=self.scratch,
                progress=lambda done, total: self.progress("collect inputs", done, total, ""))
        return self._covariances

    @functools.cached_property
    def guidance(self) -> list[dict] | None:
        """Weights of the tokens, see `optrot_edge.quantize.guidance`; None where the recipe asks for none."""
        from optrot_edge.quantize.guidance import token_weights

        if self.recipe.guidance == "none":
            return None
        return token_weights(self.source, self.tokens, seed=self.recipe.seed, device=self.device,
                             progress=lambda done, total: self.progress("guidance", done, total, ""))

    @functools.cached_property
    def _measured(self):
        """Tokens [windows, seqlen] that sensitivities are measured on, and `output_sensitivity` of them."""
        import torch

        from optrot_edge.rotations.sensitivity import output_sensitivity

        count = min(len(self.tokens), max(1, SENSITIVITY_TOKENS // self.recipe.seqlen))
        chosen = self.tokens[torch.linspace(0, len(self.tokens) - 1, count).long()]
        return chosen, *output_sensitivity(self.source, chosen, self.covariances, self.recipe.grid,
                                           torch.Generator().manual_seed(self.recipe.seed), damp=self.recipe.damp,
                                           device=self.device, scratch=self.scratch,
                                           progress=lambda done, total: self.progress("sensitivity", done, total, ""))

    @property
    def sensitivity(self) -> list[dict]:
        """Output sensitivities of the float model, see `optrot_edge.rotations.sensitivity`."""
        return self._measured[1]

    @property
    def gradient(self) -> tuple:
        """Tokens [windows, seqlen] and the gradient at the embedding's output [windows, seqlen, hidden] on them."""
        return self._measured[0], self._measured[2]

    @functools.cached_property
    def costs(self) -> dict[str, dict[str, float]]:
        """KL of every matrix in every type, see `optrot_edge.quantize.costs`; kept in the user's cache."""
        from optrot_edge.quantize.costs import kept_costs, measure_costs

        recipe = self.recipe
        key = {"model": sorted(sha256(path) for path in self.source.files), "text": self.text_sha256,
               **{name: getattr(recipe, name) for name in
                  ("nsamples", "seqlen", "seed", "damp", "grid", "format", "dtype", "group_size", "symmetric")}}
        return kept_costs(key, lambda: measure_costs(
            self.source, self, progress=lambda done, total: self.progress("cost of types", done, total, "")))

    def allot(self, config) -> tuple[dict[str, str], float]:
        """Types of the recipe's target size for the (rotated) model's `config`, and the KL expected of them."""
        from optrot_edge.budget import allot, check_target

        budget = check_target(self.source, config, self.recipe)
        return allot(self.source.family, config, self.recipe, self.costs, budget)

    @functools.cached_property
    def body_grid(self) -> str:
        """The type of most of the body, which a rotation is learned for."""
        from optrot_edge.tensor_types import all_shapes, most_frequent

        if not self.recipe.has_target:
            return self.recipe.grid
        config = self.source.config
        return most_frequent(self.allot(config)[0], all_shapes(self.source.family, config))
