"""The whole road as functions: rotate, quantize, export, evaluate, plan. The CLI is a thin skin on it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
import warnings
from pathlib import Path

from optrot_edge.checkpoint import (
    FLOAT_TYPES,
    GGUF_GRIDS,
    CheckpointWriter,
    NoWriter,
    QuantizedCheckpoint,
    chosen_by_auto,
)
from optrot_edge.errors import InputError
from optrot_edge.inputs import CalibrationInputs, Progress, check_windows, hash_file
from optrot_edge.processes import process_count, process_rank
from optrot_edge.recipe import Recipe
from optrot_edge.rotating import (
    make_rotation,
    needs_learn,
    prepare_output,
    quiet,
    resolve_device,
    rotate,
    starting_point,
    versions,
)
from optrot_edge.tensor_types import parse_overrides, tensor_types

FORMATS = ("gguf",)
__all__ = ["evaluate", "export", "plan", "prepare_output", "quantize", "rotate", "write_reference"]


def quantize(model: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet,
             rotation=None, **fields) -> Path:
    """Rotate and quantise `model` into the checkpoint folder `out`; `fields` are Recipe's.

    `rotation` may also be a Rotation made before. Raises InputError on bad input; nothing is left
    behind then. Warns of numerical trouble that the result has, which the manifest keeps under "warnings".
    Under torchrun the processes share the work and only rank 0 writes.
    """
    needs_learn()
    from optrot_edge.auto import held_out_windows, quantize_best
    from optrot_edge.models import open_model
    from optrot_edge.plan import check_widths
    from optrot_edge.rotations.distributed import local_device

    started = time.perf_counter()
    if isinstance(rotation, str | Path):
        fields["rotation"], rotation = rotation, None
    elif rotation is not None:
        fields.setdefault("rotation", "none")  # nothing is to be made
    recipe = Recipe(**fields)
    source = open_model(model)
    for note in check_widths(source, recipe):
        progress("types", 1, 1, note)
    device = local_device(resolve_device(recipe.device))
    choose = rotation is None and recipe.rotation == "auto"
    if process_count() > 1:
        _refuse_processes(recipe, choose)
    with NoWriter(out) if process_rank() else CheckpointWriter(out, overwrite=overwrite) as writer, CalibrationInputs(
            source, recipe, device, writer.work, held_out=held_out_windows(recipe) if choose else 0,
            progress=progress) as inputs:

        def fill(recipe: Recipe, writer: CheckpointWriter, made=None) -> dict:
            made = made or make_rotation(source, recipe, progress, inputs=inputs)
            return _fill(source, made, recipe, inputs, writer, progress)

        if choose:
            manifest = quantize_best(source, recipe, inputs, writer, _stored_bits(source, recipe), fill, progress)
            progress("choose", 1, 1, manifest["auto"]["why"])
        else:
            manifest = fill(recipe, writer, rotation)
        if recipe.distill:
            manifest |= {"distill": _distill(source, recipe, inputs, writer, manifest, progress)}
        inputs.close()  # what it keeps lies in the folder that becomes the checkpoint
        for said in manifest["warnings"]:
            warnings.warn(said, stacklevel=2)
        return writer.finish(manifest | {"seconds": round(time.perf_counter() - started, 1)})


def _refuse_processes(recipe: Recipe, choose: bool) -> None:
    """InputError for what cannot share its work yet."""
    if choose:
        raise InputError("--rotation auto runs in one process; under torchrun name a rotation (none, hadamard, optrot) "
                         "or a file made by `rotate`")
    for option, given in (("--distill", recipe.distill), ("--target-bpw and --target-size", recipe.has_target)):
        if given:
            raise InputError(f"{option} need one process; start it without torchrun")


def _stored_bits(source, recipe: Recipe):
    """What `optrot_edge.auto.candidates` asks for: the size of an arm's tensors in bits."""
    from optrot_edge.plan import stored_bytes

    return lambda arm: 8 * stored_bytes(source, starting_point(source, dataclasses.replace(
        recipe, rotation=arm.rotation, rotate=arm.rotate)), recipe)


def _fill(source, rotation, recipe: Recipe, inputs: CalibrationInputs, writer: CheckpointWriter,
          progress: Progress) -> dict:
    """Quantise `source` under `rotation` into `writer`; returns the manifest."""
    from optrot_edge.plan import check_widths
    from optrot_edge.quantize.numerics import warnings_of
    from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
    from optrot_edge.rotations.fuse import RotatedModel

    rotated = RotatedModel(source, rotation, inputs.device)
    chosen, expected = inputs.allot(rotated.config) if recipe.has_target else (None, None)
    types = tensor_types(source.family, rotated.config, recipe, chosen)
    options = QuantizerOptions(types, recipe.quantizer, recipe.damp, recipe.act_order, recipe.asymmetric,
                               recipe.refits, device=inputs.device)
    quantizer = SequentialQuantizer(rotated, options, inputs.tokens)
    quantizer.run(writer, lambda done, total, worst: progress(
        "quantise layers", done, total, f"worst SNR {worst:.1f} dB"))
    if process_rank():
        return {"warnings": []}
    source.save_tokenizer(writer.work / "tokenizer")
    return {"model": rotated.config.to_dict(), "rotation": rotation.describe(),
            "recipe": dataclasses.asdict(recipe) | {"device": inputs.device}, "seed": recipe.seed,
            "calibration_sha256": inputs.text_sha256, "versions": versions(),
            "inputs": {path.name: hash_file(path) for path in source.files}, "errors": quantizer.reports,
            "expected_kl": expected, "notes": check_widths(source, recipe, rotated.config, chosen),
            "warnings": warnings_of(quantizer.reports)}


def _distill(source, recipe: Recipe, inputs: CalibrationInputs, writer: CheckpointWriter, manifest: dict,
             progress: Progress) -> dict:
    """Let what is not codes learn from `source`; returns what the manifest says of it."""
    from optrot_edge.quantize.distill import HELD_OUT, DistillOptions, distill

    report = distill(source, writer, manifest, inputs.fresh, max(1, len(inputs.fresh) // HELD_OUT),
                     DistillOptions(recipe.distill, seed=recipe.seed, device=inputs.device),
                     lambda done, total, kl: progress("distil", done, total, f"KL {kl:.4f}"))
    progress("distil", 1, 1, f"held-out KL {report['kl_before']:.4f} to {report['kl_after']:.4f}" if report["kept"] else
             "held-out KL did not fall; nothing kept")
    return report


def export(model: str | Path, out: str | Path, *, format: str = "gguf", overwrite: bool = False,
           checkpoint: str | Path | None = None, vocab_from: str | Path | None = None,
           progress: Progress = quiet, **fields) -> dict:
    """Write `model` (a checkpoint folder, or a model to quantise first) as a package; returns its summary.

    With a model, `fields` are Recipe's and `checkpoint` keeps the intermediate checkpoint there; `target_size`
    is then the size of the whole file. Under torchrun only rank 0 writes; the other processes get an empty summary.
    """
    out = Path(out)
    _check_export(model, format, fields)
    if process_rank():  # of a torchrun launch: rank 0 packages what all have quantised
        if not is_checkpoint(model):
            quantize(model, out, **fields)
        return {}
    prepare_output(out, overwrite)
    if is_checkpoint(model):
        return _export_gguf(model, out, overwrite, vocab_from, progress)
    needs_learn()
    _refuse_for_gguf(model, Recipe(**fields), vocab_from)
    fields = _without_metadata(model, fields, vocab_from)
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
    needs_learn()
    from optrot_edge.auto import candidates
    from optrot_edge.models import open_model
    from optrot_edge.plan import make_plan, plan_choice

    source, recipe = open_model(model), Recipe(**fields)
    if format is not None:
        _refuse_for_gguf(source, recipe, vocab_from)
        recipe = Recipe(**_without_metadata(source, fields, vocab_from))
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

    given = [("--type", recipe.grid), ("--embedding-type", recipe.embedding_type), ("--head-type", recipe.head_type),
             *(("--tensor-type", kind) for kind in parse_overrides(recipe.tensor_type).values())]
    for option, kind in given:
        if kind is not None and kind not in GGUF_GRIDS and kind not in FLOAT_TYPES:
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


def _without_metadata(model, fields: dict, vocab_from: str | Path | None) -> dict:
    """`fields` with the target size of a GGUF's tensors in the place of the file's; `model` may be open."""
    if fields.get("target_size") is None:
        return fields
    from optrot_edge.exporters.gguf import metadata_bytes
    from optrot_edge.exporters.gguf_plan import plan_of_model
    from optrot_edge.models import open_model

    source = open_model(model) if isinstance(model, str | Path) else model
    with tempfile.TemporaryDirectory() as folder:
        source.save_tokenizer(folder)
        metadata = metadata_bytes(plan_of_model(source.config, Path(folder), vocab_from=vocab_from))
    if fields["target_size"] <= metadata:
        raise InputError(f"--target-size {fields['target_size']:,}: vocabulary and names alone take {metadata:,} bytes")
    return fields | {"target_size": fields["target_size"] - metadata}


def _export_gguf(checkpoint, out: Path, overwrite: bool, vocab_from, progress: Progress) -> dict:
    from optrot_edge.exporters.gguf import export_gguf

    checkpoint = QuantizedCheckpoint(checkpoint)
    summary = export_gguf(checkpoint, out, overwrite=overwrite, vocab_from=vocab_from,
                          progress=lambda done, total, what: progress("write and verify", done, total, what))
    return summary | chosen_by_auto(checkpoint.manifest)
