"""The whole road as functions: rotate, quantize, export, evaluate, plan. The CLI is a thin skin on it."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

from optrot_edge.checkpoint import NoWriter, QuantizedCheckpoint, is_checkpoint
from optrot_edge.errors import InputError
from optrot_edge.fingerprint import fingerprint, shaping_fields
from optrot_edge.formats import check_format
from optrot_edge.inputs import CalibrationInputs, Progress, check_windows
from optrot_edge.journal import JOURNAL, Lock, remove_folder
from optrot_edge.memory import must_spill
from optrot_edge.packages import PACKAGES, PackageOptions, without_metadata, write_package
from optrot_edge.processes import process_count, process_rank
from optrot_edge.recipe import Recipe
from optrot_edge.resume import ResumableWriter, WorkFolder, package, was_packaged
from optrot_edge.rotating import (
    GGUF,
    make_rotation,
    needs_learn,
    prepare_output,
    quiet,
    resolve_device,
    rotate,
    starting_point,
)
from optrot_edge.tensor_types import tensor_types

__all__ = ["evaluate", "export", "plan", "prepare_output", "quantize", "rotate", "write_reference"]


def quantize(model: str | Path, out: str | Path, *, overwrite: bool = False, restart: bool = False,
             save_imatrix: str | Path | None = None, progress: Progress = quiet, rotation=None, **fields) -> Path:
    """Rotate and quantise `model` into the checkpoint folder `out`; `fields` are Recipe's.

    `rotation` may also be a Rotation made before. `save_imatrix`: write what calibration saw there too, for
    llama-quantize, see `optrot_edge.exporters.gguf_imatrix`. A run that was stopped, however, goes on where it was when
    it is started again, and gives the same bytes; `restart` forgets it. Raises InputError on bad input, where a first
    run leaves nothing behind, and on a stopped run of other settings or inputs. Warns of numerical trouble that the
    result has, which the manifest keeps under "warnings". Under torchrun the processes share the work and only rank 0
    writes.
    """
    out = named(out)
    _check_apart(out=out, save_imatrix=save_imatrix)
    _check_imatrix(save_imatrix, overwrite or (out / JOURNAL).is_file(), fields.get("calibration"))
    source, recipe, rotation = _opened(model, rotation, fields, progress)
    with _writer(out, overwrite, restart) as writer:
        path = writer.finish(_quantize_into(writer, source, recipe, rotation, progress))
        if not process_rank():
            _write_imatrix(path, save_imatrix)
        return path


def _check_imatrix(path: str | Path | None, overwrite: bool, calibration: str | None = None) -> None:
    """InputError, before any work, for an imatrix that cannot be written."""
    if path is not None:
        prepare_output(Path(path), overwrite, GGUF)
        if calibration == "none":
            raise InputError("--save-imatrix holds what calibration saw; give --calibration a text")


def _write_imatrix(checkpoint: Path, path: str | Path | None) -> dict:
    """Write the imatrix of a checkpoint folder to `path`, if asked for; what a summary says of it."""
    if path is None:
        return {}
    from optrot_edge.exporters.gguf_imatrix import export_imatrix

    return {"imatrix": export_imatrix(QuantizedCheckpoint(checkpoint), path, overwrite=True)["path"]}


def _opened(model, rotation, fields: dict, progress: Progress, *, options: PackageOptions | None = None) -> tuple:
    """The open model, the Recipe and the Rotation made before, if one is given, of `quantize`'s arguments, or
    (`options`) of `export`'s."""
    needs_learn()
    from optrot_edge.models import open_model
    from optrot_edge.plan import check_widths

    if isinstance(rotation, str | Path):
        fields["rotation"], rotation = rotation, None
    elif rotation is not None:
        fields.setdefault("rotation", "none")  # nothing is to be made
    format = fields.get("format") or "gguf"
    check_format(format)
    if format == "gguf" or fields.get("dtype"):
        Recipe(**fields)  # refuses a bad one before the model is read, or downloaded
    source = open_model(model)
    recipe = PACKAGES[format].recipe(source, fields, options or PackageOptions())
    if options is not None:
        PACKAGES[format].refuse(source, recipe, options)
        recipe = without_metadata(source, recipe, options)
    must_spill(source.config, recipe)  # refuses too small a --max-memory before any work
    for note in check_widths(source, recipe):
        progress("types", 1, 1, note)
    if process_count() > 1:
        _refuse_processes(recipe, rotation is None and recipe.rotation == "auto")
    return source, recipe, rotation


def _writer(out: Path, overwrite: bool, restart: bool, *, temporary: bool = False):
    """Where a process writes its checkpoint: of a torchrun launch only rank 0 does, and such a run is not resumed."""
    if process_rank():
        return NoWriter(out)
    return ResumableWriter(out, overwrite=overwrite, restart=restart, temporary=temporary, resume=process_count() == 1)


def _quantize_into(writer, source, recipe: Recipe, rotation, progress: Progress) -> WorkFolder | NoWriter:
    """Quantise an open model into the work folder of `writer`, or finish what is there; returns the complete one."""
    from optrot_edge.auto import held_out_windows, quantize_best
    from optrot_edge.rotations.distributed import local_device

    device = local_device(resolve_device(recipe.device))
    choose = rotation is None and recipe.rotation == "auto"
    with CalibrationInputs(source, recipe, device, held_out=held_out_windows(recipe) if choose else 0,
                           progress=progress) as inputs:
        settings = fingerprint(source, recipe, device, inputs.text_sha256, rotation)
        folder = writer.begin(settings)
        inputs.folder = folder.work
        if folder.is_complete:
            return folder

        def fill(recipe: Recipe, folder: WorkFolder) -> dict:
            made = folder.rotation(lambda: rotation or make_rotation(source, recipe, progress, inputs=inputs))
            return _fill(source, made, recipe, inputs, folder, settings, progress)

        def polish(folder: WorkFolder, manifest: dict) -> dict:
            if recipe.distill:
                manifest = manifest | {"distill": _distill(source, recipe, inputs, folder, manifest, progress)}
            for said in manifest["warnings"]:
                warnings.warn(said, stacklevel=4)  # whoever called `quantize` or `export`
            return manifest

        if choose:
            folder, why = quantize_best(source, recipe, inputs, writer, _stored_bits(source, recipe), fill, polish,
                                        progress)
            progress("choose", 1, 1, why)
        else:
            folder.complete(polish(folder, fill(recipe, folder)))
        return folder


def _refuse_processes(recipe: Recipe, choose: bool) -> None:
    """InputError for what cannot share its work yet."""
    if choose:
        raise InputError("--rotation auto runs in one process; under torchrun name a rotation (none, hadamard, optrot) "
                         "or a file made by `rotate`")
    for option, given in (("--distill", recipe.distill), ("--guidance", recipe.guidance != "none"),
                          ("--target-bpw or --target-size", recipe.has_target)):
        if given:
            raise InputError(f"{option}: this needs one process; start it without torchrun")


def _stored_bits(source, recipe: Recipe):
    """What `optrot_edge.auto.candidates` asks for: the size of an arm's tensors in bits."""
    from optrot_edge.plan import stored_bytes

    return lambda arm: 8 * stored_bytes(source, starting_point(source, dataclasses.replace(
        recipe, rotation=arm.rotation, rotate=arm.rotate)), recipe)


def _fill(source, rotation, recipe: Recipe, inputs: CalibrationInputs, folder: WorkFolder, settings: dict,
          progress: Progress) -> dict:
    """Quantise `source` under `rotation` into `folder`; returns the manifest."""
    from optrot_edge.plan import check_widths
    from optrot_edge.quantize.numerics import warnings_of
    from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
    from optrot_edge.rotations.fuse import packaged

    rotated = packaged(source, rotation, recipe.format, inputs.device)
    chosen, expected = inputs.allot(rotated.config) if recipe.has_target else (None, None)
    types = tensor_types(source.family, rotated.config, recipe, chosen)
    options = QuantizerOptions(types, recipe.quantizer, recipe.damp, recipe.act_order, recipe.asymmetric,
                               recipe.refits, device=inputs.device)
    quantizer = SequentialQuantizer(rotated, options, inputs.tokens, inputs.scratch, inputs.guidance)
    quantizer.run(folder, lambda done, total, worst: progress(
        "quantise layers", done, total, f"worst SNR {worst:.1f} dB"))
    folder.save_tokenizer(source)
    return {"model": rotated.config.to_dict(), "rotation": rotation.describe(),
            "recipe": shaping_fields(recipe, inputs.device), "seed": recipe.seed,
            "calibration_sha256": settings["text"], "versions": settings["versions"],
            "bfloat16": [name for name, kind in types.items() if kind == "bf16"],
            "inputs": settings["files"], "errors": quantizer.reports, "expected_kl": expected,
            "notes": check_widths(source, recipe, rotated.config, chosen),
            "warnings": warnings_of(quantizer.reports)}


def _distill(source, recipe: Recipe, inputs: CalibrationInputs, folder: WorkFolder, manifest: dict,
             progress: Progress) -> dict:
    """Let what is not codes learn from `source`, unless a stopped run has; returns what the manifest says of it."""
    from optrot_edge.quantize.distill import HELD_OUT, NOTE, DistillOptions, distill

    remove_folder(folder.work / f"{NOTE}.partial")
    if (report := folder.journal.about(NOTE)) is not None:
        return report
    report = distill(source, folder, manifest, inputs.fresh, max(1, len(inputs.fresh) // HELD_OUT),
                     DistillOptions(recipe.distill, seed=recipe.seed, device=inputs.device),
                     lambda done, total, kl: progress("distil", done, total, f"KL {kl:.4f}"))
    progress("distil", 1, 1, f"held-out KL {report['kl_before']:.4f} to {report['kl_after']:.4f}" if report["kept"] else
             "held-out KL did not fall; nothing kept")
    if not report["kept"]:
        folder.journal.note(NOTE, report)
    return report


def export(model: str | Path, out: str | Path, *, format: str | None = None, overwrite: bool = False,
           restart: bool = False, checkpoint: str | Path | None = None, save_imatrix: str | Path | None = None,
           vocab_from: str | Path | None = None, split_max_size: str | int | None = None,
           execution_provider: str | None = None, accuracy_level: int | None = None, progress: Progress = quiet,
           **fields) -> dict:
    """Write `model` (a checkpoint folder, or a model to quantise first) as a package; returns its summary.

    `format` None: the one the checkpoint was made for, or gguf. `vocab_from`, `split_max_size`, `execution_provider`,
    `accuracy_level`: see `optrot_edge.packages.PackageOptions`; `save_imatrix`: see `quantize`.
    With a model, `fields` are Recipe's, `checkpoint` keeps the intermediate checkpoint there, `target_size` is the size
    of the whole package, and a run that was stopped goes on when it is started again (see `quantize`). Under torchrun
    only rank 0 writes; the other processes get an empty summary.
    """
    out, format = named(out), _format_of(model, format, fields)
    options = PackageOptions(vocab_from, split_max_size, execution_provider, accuracy_level)
    options.check(format)
    place = checkpoint_of(out) if checkpoint is None else Path(checkpoint)
    if process_rank():  # of a torchrun launch: rank 0 packages what all have quantised
        if not is_checkpoint(model):
            opened = _opened(model, None, fields | {"format": format}, quiet, options=options)
            with _writer(place, overwrite, restart) as writer:
                _quantize_into(writer, *opened, quiet)
        return {}
    _check_apart(out=out, checkpoint=checkpoint, save_imatrix=save_imatrix)
    with Lock(out.with_name(out.name + ".lock")):
        overwrites = overwrite or was_packaged(place, out)
        PACKAGES[format].prepare(out, overwrites)
        _check_imatrix(save_imatrix, overwrites, fields.get("calibration"))
        if is_checkpoint(model):
            summary = write_package(format, model, out, overwrite, options, progress)
            return summary | _write_imatrix(model, save_imatrix)
        source, recipe, rotation = _opened(model, None, fields | {"format": format}, progress, options=options)
        with _writer(place, overwrite, restart, temporary=checkpoint is None) as writer:
            folder = _quantize_into(writer, source, recipe, rotation, progress)
            if checkpoint is not None:
                writer.finish(folder)
            summary = package(folder, out, options.recorded(), lambda path: write_package(
                format, folder.work, path, True, options, progress), is_file=PACKAGES[format].is_file)
            return summary | _write_imatrix(folder.work, save_imatrix)


def named(out: str | Path) -> Path:
    """`out`, absolute where that is what it takes to have a name ("." and ".."), links followed. InputError for the
    root and for a link to itself."""
    out = Path(out)
    try:
        if out.is_symlink():
            out = out.resolve()
        elif out.name in ("", ".."):
            out = Path(os.path.abspath(out))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--out {out}: {error}") from None
    if not out.name:
        raise InputError(f"--out {out} cannot be replaced by a package; give a name in it")
    return out


def _check_apart(**places: str | Path | None) -> None:
    """InputError when two outputs have one place."""
    taken: dict[Path, str] = {}
    for name, place in places.items():
        if place is None:
            continue
        option, place = f"--{name.replace('_', '-')}", Path(place).resolve()
        if place in taken:
            raise InputError(f"{taken[place]} and {option} are both {place}; give each a place of its own")
        taken[place] = option


def checkpoint_of(out: str | Path) -> Path:
    """Where `export` to `out` keeps its checkpoint while it is at work."""
    out = named(out)
    return out.with_name(out.name + ".checkpoint")


def plan(model: str | Path, *, packaged: bool = False, format: str | None = None,
         vocab_from: str | Path | None = None, split_max_size: str | int | None = None,
         execution_provider: str | None = None, accuracy_level: int | None = None, **fields) -> dict:
    """What `quantize`, or with `packaged` `export`, would do and cost; see optrot_edge.plan.

    Refuses what they would refuse before their work begins.
    """
    format = _format_of(model, format, fields)
    options = PackageOptions(vocab_from, split_max_size, execution_provider, accuracy_level)
    options.check(format)
    if packaged and is_checkpoint(model):
        from optrot_edge.plan import plan_checkpoint

        return plan_checkpoint(model, format, options)
    from optrot_edge.auto import candidates
    from optrot_edge.plan import make_plan, plan_choice

    source, recipe, _ = _opened(model, None, fields | {"format": format}, quiet, options=options if packaged else None)
    check_windows(source, recipe)
    resolve_device(recipe.device)
    start = starting_point(source, recipe)
    if recipe.rotation == "auto":
        return plan_choice(source, recipe, candidates(source, recipe, _stored_bits(source, recipe)), starting_point)
    return make_plan(source, recipe, start)


def evaluate(package: str | Path, reference: str | Path, *, text: str | None = None, **options) -> dict:
    """The report of `package` against `reference` (a model or a reference file).

    `text` is a file, "builtin" or a hub dataset; options are those of
    `optrot_edge.runtime.evaluate.evaluate_package`.
    """
    from optrot_edge.quantize.calibration import load_text
    from optrot_edge.runtime.evaluate import evaluate_package

    words = None if text is None else load_text(text, split="test")
    return evaluate_package(package, reference=reference, text=words, **options)


def chat(package: str | Path, prompt: str, *, max_tokens: int = 128, **options) -> str:
    """The package's greedy answer to `prompt`; options are those of `optrot_edge.runtime.backends.open_package`."""
    from optrot_edge.runtime.backends import open_package

    with open_package(package, **options) as runner:
        if not hasattr(runner, "chat"):
            raise InputError(f"{package} gives logits only; export it to chat with it")
        return runner.chat(prompt, max_tokens)


def write_reference(model: str | Path, out: str | Path, *, text: str, **options):
    """Score `text` with `model` into a reference file for devices without torch or the model."""
    from optrot_edge.quantize.calibration import load_text
    from optrot_edge.runtime.evaluate import write_reference_file

    return write_reference_file(model, out, text=load_text(text, split="test"), **options)


def _format_of(model: str | Path, format: str | None, fields: dict) -> str:
    """The format of the package to make; InputError for an unknown one, and for `fields` of what is quantised."""
    if format is not None:
        check_format(format)
    if not is_checkpoint(model):
        return format or "gguf"
    if fields:
        options = ", ".join("--" + name.replace("_", "-") for name in sorted(fields))
        raise InputError(f"{model} is already quantised; {options} cannot be changed now")
    return format or (QuantizedCheckpoint(model).manifest.get("recipe") or {}).get("format", "gguf")
