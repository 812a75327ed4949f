"""The whole road as functions: rotate, quantize, export, evaluate, plan. The CLI is a thin skin on it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from optrot_edge.checkpoint import (
    FLOAT_TYPES,
    GGUF_GRIDS,
    CheckpointWriter,
    QuantizedCheckpoint,
)
from optrot_edge.errors import InputError
from optrot_edge.recipe import ROTATIONS, Recipe

Progress = Callable[[str, int, int, str], None]  # stage, done, total, note
FORMATS = ("gguf",)


def _quiet(stage: str, done: int, total: int, note: str) -> None:
    """The progress sink when none is given."""


def resolve_device(name: str) -> str:
    """ "auto" to the best device here; InputError when a named one is absent."""
    import torch

    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if usable[device])
    if not usable.get(name, False):
        raise InputError(f"--device {name} is not usable here; usable: "
                         + ", ".join(device for device, there in usable.items() if there))
    return name


def _needs_learn() -> None:
    """A readable refusal on a machine that only has the base install."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError('rotating and quantising need torch: pip install "optrot-edge[learn]"') from None


def make_rotation(source, recipe: Recipe, progress: Progress = _quiet, *, learned: bool = True):
    """Draw, learn or load the rotation that `recipe` names for an open model `source`.

    `learned` False gives only the starting point of one that is to be learned.
    """
    import torch

    from optrot_edge.rotations.optrot import OptRotOptions, initial_rotation, learn
    from optrot_edge.rotations.rotation import Rotation

    if recipe.rotation not in ROTATIONS:
        rotation = Rotation.load(recipe.rotation)
        rotation.validate(source.config)
        if recipe.which != set(rotation.applied):
            held = ",".join(rotation.applied)
            raise InputError(f"--rotate {recipe.rotate}: {recipe.rotation} holds {held}; pass --rotate {held}")
        return rotation
    if recipe.rotation == "none":
        return Rotation("none")
    config, which = source.config, recipe.which
    blocks = {}
    if "r3" in which:
        blocks["r3_block"] = config.head_dim & -config.head_dim  # largest power of two that divides it
    if "r4" in which:
        blocks["r4_block"] = recipe.r4_block
    Rotation("hadamard", **blocks).validate(config)  # before matrices are drawn
    generator = torch.Generator().manual_seed(recipe.seed)
    rotation = initial_rotation(config, which, generator, **blocks)
    rotation.validate(config)
    rotation.recipe["seed"] = recipe.seed
    if recipe.rotation == "optrot" and learned:
        options = OptRotOptions(recipe.optrot_solver, recipe.optrot_steps, recipe.optrot_rows or None)
        rotation = learn(source, rotation, options, generator, device=resolve_device(recipe.device),
                         progress=lambda done, total: progress("learn rotation", done, total, ""))
    return rotation


def rotate(model: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = _quiet, **fields):
    """Learn or draw a rotation for `model` and save it to `out`; `fields` are Recipe's."""
    _needs_learn()
    from optrot_edge.models import open_model

    recipe = Recipe(**fields)
    prepare_output(Path(out), overwrite)
    rotation = make_rotation(open_model(model), recipe, progress)
    if not rotation.applied:
        raise InputError("nothing to save: --rotation none rotates nothing")
    rotation.save(out)
    return rotation


def _check_seqlen(source, recipe: Recipe) -> None:
    if recipe.calibration != "none" and recipe.seqlen > source.config.max_position_embeddings:
        raise InputError(f"--seqlen {recipe.seqlen} exceeds the model's context of "
                         f"{source.config.max_position_embeddings} tokens")


def calibration_windows(source, recipe: Recipe):
    """Calibration tokens [nsamples, seqlen] (torch int64) and the SHA-256 of their text."""
    import torch

    from optrot_edge.quantize.calibration import load_text, sample_windows, text_hash
    from optrot_edge.runtime.text import open_tokenizer

    _check_seqlen(source, recipe)
    text = load_text(recipe.calibration)
    tokenizer = open_tokenizer(source.path)
    ids, bos = tokenizer.tokenize(text), tokenizer.bos if tokenizer.adds_bos else None
    tokenizer.close()
    if max(ids, default=0) >= source.config.vocab_size:
        raise InputError("the tokenizer yields ids beyond the model's vocabulary; they do not belong together")
    windows = sample_windows(ids, recipe.nsamples, recipe.seqlen, recipe.seed, bos)
    return torch.from_numpy(windows), text_hash(text)


def quantize(model: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = _quiet,
             rotation=None, **fields) -> Path:
    """Rotate and quantise `model` into the checkpoint folder `out`; `fields` are Recipe's.

    `rotation` may also be a Rotation made before. Raises InputError on bad input; nothing is left
    behind then.
    """
    _needs_learn()
    from optrot_edge.models import open_model
    from optrot_edge.plan import check_widths
    from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
    from optrot_edge.rotations.fuse import RotatedModel

    started = time.perf_counter()
    if isinstance(rotation, str | Path):
        fields["rotation"], rotation = rotation, None
    recipe = Recipe(**fields)
    source = open_model(model)
    check_widths(source, recipe)
    device = resolve_device(recipe.device)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        tokens, text_sha = (None, None) if recipe.calibration == "none" else calibration_windows(source, recipe)
        if rotation is None:
            rotation = make_rotation(source, recipe, progress)
        rotated = RotatedModel(source, rotation, device)
        options = QuantizerOptions(recipe.type, recipe.embedding_type, recipe.head_type, recipe.quantizer,
                                   recipe.damp, recipe.act_order, device=device)
        quantizer = SequentialQuantizer(rotated, options, tokens)
        quantizer.run(writer, lambda done, total, worst: progress(
            "quantise layers", done, total, f"worst SNR {worst:.1f} dB"))
        source.save_tokenizer(writer.work / "tokenizer")
        recipe_fields = dataclasses.asdict(recipe) | {"device": device}
        return writer.finish({
            "model": rotated.config.to_dict(), "rotation": rotation.describe(), "recipe": recipe_fields,
            "seed": recipe.seed, "calibration_sha256": text_sha, "versions": versions(),
            "inputs": {path.name: _sha256(path) for path in source.files},
            "errors": quantizer.reports, "seconds": round(time.perf_counter() - started, 1)})


def export(model: str | Path, out: str | Path, *, format: str = "gguf", overwrite: bool = False,
           checkpoint: str | Path | None = None, vocab_from: str | Path | None = None,
           progress: Progress = _quiet, **fields) -> dict:
    """Write `model` (a checkpoint folder, or a model to quantise first) as a package; returns its summary.

    With a model, `fields` are Recipe's and `checkpoint` keeps the intermediate checkpoint there.
    """
    out = Path(out)
    _check_export(model, format, fields)
    prepare_output(out, overwrite)
    if is_checkpoint(model):
        return _export_gguf(model, out, overwrite, vocab_from, progress)
    _needs_learn()
    _refuse_for_gguf(model, Recipe(**fields), vocab_from)
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            work = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            checkpoint = Path(work) / "checkpoint"
        quantize(model, checkpoint, overwrite=overwrite, progress=progress, **fields)
        return _export_gguf(checkpoint, out, overwrite, vocab_from, progress)


def plan(model: str | Path, *, format: str | None = None, vocab_from: str | Path | None = None, **fields) -> dict:
    """What `export` into `format` (or `quantize`, without one) would do and cost; see optrot_edge.plan.

    Refuses what they would refuse before their work begins.
    """
    if format is not None:
        _check_export(model, format, fields)
        if is_checkpoint(model):
            from optrot_edge.plan import plan_checkpoint

            return plan_checkpoint(model, vocab_from)
    _needs_learn()
    from optrot_edge.models import open_model
    from optrot_edge.plan import make_plan

    source, recipe = open_model(model), Recipe(**fields)
    if format is not None:
        _refuse_for_gguf(source, recipe, vocab_from)
    _check_seqlen(source, recipe)
    resolve_device(recipe.device)
    return make_plan(source, recipe, make_rotation(source, recipe, learned=False))


def evaluate(package: str | Path, reference: str | Path, *, text: str | None = None, **options) -> dict:
    """The report of `package` against `reference` (a model or a reference file).

    `text` is a file, "builtin" or a hub dataset; options are those of
    `optrot_edge.runtime.evaluate.evaluate_package`.
    """
    from optrot_edge.quantize.calibration import load_text
    from optrot_edge.runtime.evaluate import evaluate_package

    words = None if text is None else load_text(text, split="test")
    return evaluate_package(package, reference=reference, text=words, **options)


def write_reference(model: str | Path, out: str | Path, *, text: str, **options):
    """Score `text` with `model` into a reference file for devices without torch or the model."""
    from optrot_edge.quantize.calibration import load_text
    from optrot_edge.runtime.evaluate import write_reference_file

    return write_reference_file(model, out, text=load_text(text, split="test"), **options)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder that `quantize` wrote."""
    return (Path(path) / "optrot.json").is_file()


def _check_export(model: str | Path, format: str, fields: dict) -> None:
    if format not in FORMATS:
        raise InputError(f"--format {format}: use {', '.join(FORMATS)}")
    if fields and is_checkpoint(model):
        options = ", ".join("--" + name.replace("_", "-") for name in sorted(fields))
        raise InputError(f"{model} is already quantised; {options} cannot be changed now")


def _refuse_for_gguf(model, recipe: Recipe, vocab_from: str | Path | None) -> None:
    """Say before an hour of work what the exporter would refuse after it; `model` may be open."""
    from optrot_edge.exporters.gguf_vocab import vocabulary
    from optrot_edge.models import open_model

    for option, kind in (("--type", recipe.type), ("--embedding-type", recipe.embedding_type),
                         ("--head-type", recipe.head_type)):
        if kind not in GGUF_GRIDS and kind not in FLOAT_TYPES:
            raise InputError(f"{option} {kind}: GGUF stores {', '.join((*GGUF_GRIDS, *FLOAT_TYPES))}")
    which = set() if recipe.rotation == "none" else recipe.which
    if "r4" in which:
        raise InputError("--rotate r4: stock llama.cpp has no R4 and would run the file wrongly; "
                         "use --rotate r1,r2 for GGUF")
    if "r3" in which:
        raise InputError("--rotate r3: llama.cpp rotates a quantised K/V cache itself; leave r3 out for GGUF")
    source = open_model(model) if isinstance(model, str | Path) else model
    own = source.path if source.kind == "gguf" else None
    vocabulary(source.path, source.config.vocab_size, vocab_from=vocab_from or own)


def _export_gguf(checkpoint, out: Path, overwrite: bool, vocab_from, progress: Progress) -> dict:
    from optrot_edge.exporters.gguf import export_gguf

    return export_gguf(QuantizedCheckpoint(checkpoint), out, overwrite=overwrite, vocab_from=vocab_from,
                       progress=lambda done, total, what: progress("write and verify", done, total, what))


def prepare_output(out: Path, overwrite: bool) -> None:
    """Make the folder of the file `out`; InputError when it cannot be, or when `out` is taken."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another --out or pass --overwrite")
    if out.is_dir():
        raise InputError(f"{out} is a folder; --out must name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {out.parent}: {error.strerror}") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions() -> dict:
    """Versions of what shaped the result."""
    found = {"python": platform.python_version()}
    for name in ("optrot-edge", "torch", "numpy", "gguf", "safetensors", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
