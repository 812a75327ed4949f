"""Measuring a comparison row by row; a run that was stopped goes on at the row it was in.

The folder holds `journal.json` with all that is measured, the rotations, and, while a build is being measured, its
checkpoint under `work`. Rows that failed, or did not fit the time, are tried again by the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from optrot_edge.checkpoint import is_checkpoint
from optrot_edge.compare.arms import ARMS, learning_of, not_reproduced
from optrot_edge.compare.options import Build, CompareOptions, Row
from optrot_edge.errors import InputError, StorageError
from optrot_edge.inputs import CalibrationInputs, Progress
from optrot_edge.journal import Journal, commit, remove_folder, sha256

SCORES = ("kl_mean", "kl_se", "kl_median", "kl_p90", "kl_p99", "ppl", "ppl_se", "top1", "top1_se", "nonfinite",
          "windows", "tokens")

ORIGINAL = "original"  # as journals call the float model's accuracies


class TooLong(InputError):
    """What would not end within `--max-minutes`."""


class Reference:
    """The float model's logits on `tokens` [windows, length], from hidden states that are computed once."""

    def __init__(self, source, tokens: np.ndarray, device: str):
        from optrot_edge.runtime.torch_reference import TorchBackend

        self.source, self.tokens, self.device = source, tokens, device
        self.name = TorchBackend(source, device=device).name

    @functools.cached_property
    def _states(self):
        import torch

        from optrot_edge.models.forward import final_hidden

        hidden = final_hidden(self.source, torch.from_numpy(self.tokens.astype(np.int64)), device=self.device)
        head = self.source.lm_head(torch.float32)
        return hidden, (self.source.embedding(torch.float32) if head is None else head).to(self.device)

    def iter_logits(self, tokens: np.ndarray, *, progress=None):
        """Logits float32 [n, vocab] of each window."""
        import torch

        hidden, head = self._states
        for window in hidden:
            yield torch.nn.functional.linear(window.to(self.device), head).to("cpu", torch.float32).numpy()


class Comparison:
    """Measures rows into the journal of `folder`; `tokens` are the windows evaluated. `interrupted` tells whether an
    exception stands for a signal, see `optrot_edge.stopping.stoppable`. `tasks`: zero-shot ones, by name."""

    def __init__(self, source, options: CompareOptions, inputs: CalibrationInputs, tokens: np.ndarray, journal: Journal,
                 progress: Progress, interrupted: Callable[[], bool] = lambda: False, tasks: dict | None = None):
        self.source, self.options, self.inputs, self.tokens, self.tasks = source, options, inputs, tokens, tasks or {}
        self.journal, self.folder, self.progress, self.interrupted = journal, journal.folder, progress, interrupted
        self.work, self.device, self.began = journal.folder / "work", inputs.device, time.monotonic()
        self.reference = Reference(source, tokens, self.device)

    def measure(self, written: Callable[[], object]) -> None:
        """Measure every row that is not in the journal yet; `written()` is called after each build."""
        self.work.mkdir(exist_ok=True)
        for stray in self.work.glob(".optrot-covariances-*"):  # of a run that was killed
            shutil.rmtree(stray)
        rows = self.options.rows()
        groups = [(build, list(group)) for build, group in itertools.groupby(rows, lambda row: row.build)]
        for index, (build, group) in enumerate(groups):
            self.progress("compare", index, len(groups), build.name)
            pending = [row for row in group if not self._is_done(row)]
            if pending:
                self._measure(build, pending)
                written()
        if any(is_measured(self.journal, row) for row in rows):
            with self._noting(lambda: f"tasks {ORIGINAL}"):
                self._zero_shot(ORIGINAL, self.source, 16)
        self.progress("compare", len(groups), len(groups), "")
        if all(map(self._is_done, rows)):  # else what was quantised for rows that failed serves the next run
            shutil.rmtree(self.work)

    def _measure(self, build: Build, rows: list[Row]) -> None:
        """Quantise and evaluate `rows` of one build, or note why that could not be."""
        arm, made, failure = ARMS[build.arm], None, None
        for row in rows:
            with self._noting(lambda row=row: f"{'tasks' if is_measured(self.journal, row) else 'row'} {row.name}"):
                if failure is not None:
                    raise failure
                if made is None:
                    try:
                        made = self._analysed(row) if arm.analysis else self._quantized(build)
                    except Exception as error:
                        failure = error
                        raise
                self._evaluate(row, made)
            if arm.analysis and arm.baseline:  # learned for the row's activations
                made = failure = None
        if all(self._is_done(row) for row in rows):
            remove_folder(self.work / build.name)

    @contextlib.contextmanager
    def _noting(self, name: Callable[[], str]):
        """Note under `name()` why what is done here could not be; the others are to be measured all the same."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            if self.interrupted():
                raise KeyboardInterrupt from error
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            status = "skipped" if isinstance(error, TooLong) else "failed"
            self.journal.note(name(), (self.journal.about(name()) or {}) | {"status": status,
                                                                            "reason": f"{kind}{error}"})

    def rotation(self, build: Build):
        """The build's rotation, drawn or learned the first time, and its quantities measured."""
        from optrot_edge.rotating import make_rotation
        from optrot_edge.rotations.rotation import Rotation

        if ARMS[build.arm].rotation == "none":
            rotation = Rotation("none")
        else:
            def make(path: Path) -> dict:
                recipe = self.options.rotation_recipe(build)
                with CalibrationInputs(self.source, recipe, self.device, self.work, covariances=self.inputs.covariances,
                                       progress=self.progress) as inputs:
                    made = make_rotation(self.source, recipe, self.progress, inputs=inputs)
                made.save(path)
                return {"learning": learning_of(made.recipe), "loss_curve": made.recipe.get("loss_curve")}

            rotation = Rotation.load(self._kept(f"rotations/{build.rotation}.safetensors", make))
        self._quantities(build, rotation)
        return rotation

    def _quantities(self, build: Build, rotation) -> list[dict]:
        from optrot_edge.compare.quantities import arm_quantities

        if (found := self.journal.about(f"quantities {build.rotation}")) is None:
            recipe = self.inputs.recipe
            found = {"layers": arm_quantities(
                self.source, rotation, self.inputs.covariances, damp=recipe.damp, act_order=recipe.act_order,
                mu_h=self.options.mu_h, device=self.device,
                progress=lambda done, total: self.progress("measure matrices", done, total, build.rotation))}
            self.journal.note(f"quantities {build.rotation}", found)
        return found["layers"]

    def _quantized(self, build: Build):
        """The build's checkpoint, made or finished if need be and opened to be decoded, and its errors measured."""
        from optrot_edge import pipeline
        from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint

        folder, measured = self.work / build.name, self.journal.about(f"errors {build.name}")
        if measured is not None and is_checkpoint(folder):
            return DecodedCheckpoint(folder)
        self._check_time(build)
        rotation = self.rotation(build)
        if not is_checkpoint(folder):
            with warnings.catch_warnings():  # the manifest keeps them, and the row says how many
                warnings.simplefilter("ignore")
                pipeline.quantize(self.inputs.source.path, folder, rotation=rotation, progress=self.progress,
                                  **self.options.quantizing(build))
        made = DecodedCheckpoint(folder)
        if measured is None:
            self._note_errors(build, rotation, made, self._quantities(build, rotation),
                              warnings=made.checkpoint.manifest["warnings"])
        return made

    def _analysed(self, row: Row):
        """The model in memory of an analysis arm, its transforms learned for the row's grid and activations the first
        time; the errors are those of the first row's."""
        import torch

        from optrot_edge.rotations.analysis import AnalysisOptions, LearnedTransforms, analyse, learn_transforms
        from optrot_edge.rotations.rotation import Rotation

        build, recipe, learned = row.build, self.options.rotation_recipe(row.build), None
        self._check_time(build)
        options = AnalysisOptions(ARMS[build.arm].rotation, recipe.type, build.quantizer, row.activations,
                                  recipe.e2e_steps, recipe.damp, recipe.act_order, self.device)
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        if ARMS[build.arm].baseline:
            def make(path: Path) -> dict:
                made = learn_transforms(self.source, self.inputs.tokens, options, generator, lambda done, total:
                                        self.progress("learn transforms", done, total, row.name))
                made.save(path)
                return {"learning": made.learning, "loss_curve": None}

            learned = LearnedTransforms.load(self._kept(f"rotations/{row.transforms}.safetensors", make))
        made = analyse(self.source, self.inputs.tokens, options, generator,
                       lambda done, total: self.progress("quantise layers", done, total, row.name), learned=learned)
        if self.journal.about(f"errors {build.name}") is None:
            self._note_errors(build, Rotation("none"), made, [], warnings=[])
        return made

    def _kept(self, name: str, make: Callable[[Path], dict]) -> Path:
        """The file `name` of the folder as the journal knows it, made by `make(path)`, which returns what to note."""
        path, entry = self.folder / name, self.journal.entries.get(name)
        if entry is None or not (path.is_file() and sha256(path) == entry["sha256"]):
            path.parent.mkdir(exist_ok=True)
            about: dict = {}
            commit(path, lambda partial: about.update(make(partial)))
            self.journal.keep(name, about)
        return path

    def _note_errors(self, build: Build, rotation, made, quantities: list[dict], **about) -> None:
        """Measure a quantised model layer by layer, and note that with its size."""
        from optrot_edge.compare.quantities import quantization_errors

        rows = quantization_errors(self.source, rotation, made, self.inputs.covariances, quantities, build.bits,
                                   device=self.device, progress=lambda done, total: self.progress(
                                       "measure errors", done, total, build.name))
        self.journal.note(f"errors {build.name}", {"layers": rows, **about, **self._size(build, rotation)})

    def _size(self, build: Build, rotation) -> dict:
        """Bytes of all tensors as a package stores them, and bits per weight of the original."""
        from math import prod

        from optrot_edge.plan import stored_bytes
        from optrot_edge.tensor_types import all_shapes

        size = stored_bytes(self.source, rotation, self.options.rotation_recipe(build))
        weights = sum(map(prod, all_shapes(self.source.family, self.source.config).values()))
        return {"bytes": round(size), "bits_per_weight": 8 * size / weights}

    def _evaluate(self, row: Row, made) -> None:
        """Score a row's model, on the text and in the tasks, and note it."""
        if self._left() is not None and self._left() <= 0:
            raise TooLong(f"the {self.options.max_minutes:g} minutes of --max-minutes had passed")
        if not is_measured(self.journal, row):
            self._score(row, made)
        self._zero_shot(row.name, made, row.activations)

    def _score(self, row: Row, made) -> None:
        from optrot_edge.runtime.evaluate import score_windows
        from optrot_edge.runtime.torch_reference import TorchBackend

        with TorchBackend(made, device=self.device, activations=row.activations) as runner:
            scores = score_windows(runner, self.reference, self.tokens,
                                   lambda done, total, what: self.progress("evaluate", done, total, row.name))
        summary = scores.summary()
        if self.journal.about("reference") is None:  # before the row, which is not measured again
            self.journal.note("reference", {"ppl": summary["ppl_reference"], "ppl_se": summary["ppl_reference_se"]})
        self.journal.note(f"row {row.name}", {
            "status": "measured", **{name: summary.get(name) for name in SCORES},
            "window_kl": [float(kl) if np.isfinite(kl) else None for kl in scores.window_kl]})

    def _zero_shot(self, name: str, model, activations: int) -> None:
        """Note the accuracies of a row, or of the ORIGINAL, in the tasks that are not measured yet."""
        from optrot_edge.runtime.text import open_tokenizer
        from optrot_edge.runtime.torch_reference import TorchBackend
        from optrot_edge.runtime.zero_shot import score_tasks

        known = known_tasks(self.journal, name, self.tasks)
        missing = {task: wanted for task, wanted in self.tasks.items() if task not in known}
        if not missing:
            return
        tokenizer = open_tokenizer(self.source.path)
        try:
            with TorchBackend(model, device=self.device, activations=activations) as runner:
                found = score_tasks(runner, tokenizer, missing, progress=lambda done, total: self.progress(
                    "tasks", done, total, name))
        finally:
            tokenizer.close()
        others = (self.journal.about(f"tasks {name}") or {}).get("scores", {})
        self.journal.note(f"tasks {name}", {"status": "measured", "scores": others | found})

    def _is_done(self, row: Row) -> bool:
        return (is_measured(self.journal, row)
                and known_tasks(self.journal, row.name, self.tasks).keys() == self.tasks.keys())

    def _left(self) -> float | None:
        """Seconds left; None without a limit."""
        limit = self.options.max_minutes
        return None if limit is None else 60 * limit - (time.monotonic() - self.began)

    def _check_time(self, build: Build) -> None:
        """TooLong when learning, quantising and evaluating would not end in time, as `optrot_edge.plan` estimates."""
        from optrot_edge.plan import make_plan
        from optrot_edge.rotating import starting_point

        if self._left() is None:
            return
        recipe = dataclasses.replace(self.options.rotation_recipe(build), quantizer=build.quantizer)
        kept = f"rotations/{build.rotation}.safetensors"
        if recipe.rotation != "none" and self.journal.about(kept) is not None and (self.folder / kept).is_file():
            recipe = dataclasses.replace(recipe, rotation="hadamard")  # nothing is left to learn
        needed = make_plan(self.source, recipe, starting_point(self.source, recipe))["seconds"]
        if needed > self._left():
            raise TooLong(f"needs about {needed / 60:.1f} minutes, and {max(0.0, self._left() / 60):.1f} of the "
                          f"{self.options.max_minutes:g} of --max-minutes are left")


def is_measured(journal: Journal, row: Row) -> bool:
    """Whether nothing is left to do for `row`."""
    return (journal.about(f"row {row.name}") or {}).get("status") == "measured"


def known_tasks(journal: Journal, name: str, tasks: dict) -> dict[str, dict]:
    """What `score_tasks` gave for a row, or for the ORIGINAL, in those of `tasks` that are still the same."""
    scores = (journal.about(f"tasks {name}") or {}).get("scores", {})
    return {task: scores[task] for task, wanted in tasks.items() if scores.get(task, {}).get("digest") == wanted.digest}


def learning_remarks(row: Row, journal: Journal) -> dict:
    """`learning` of a row's rotation or transforms, and `not_reproduced`, the reason why a learned baseline was not."""
    arm = ARMS[row.build.arm]
    entry = journal.about(f"rotations/{row.transforms if arm.analysis else row.build.rotation}.safetensors")
    learning = None if entry is None else entry["learning"]
    return {"learning": learning, "not_reproduced": None if entry is None else not_reproduced(arm, learning)}
