"""The command line: `optrot-edge export | rotate | quantize | eval | chat | reference | inspect | doctor`.

Exit codes: 0 done, 1 internal failure, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from optrot_edge.errors import InputError, StorageError
from optrot_edge.formats import DEFAULT_BITS, DEFAULT_GROUP, DTYPES, GGUF_TYPES
from optrot_edge.gridspec import MLX_BITS, MLX_GROUPS
from optrot_edge.memory import parse_size
from optrot_edge.processes import process_count, process_rank
from optrot_edge.recipe import DEFAULT_TYPE
from optrot_edge.stopping import stoppable, what_is_kept
from optrot_edge.tensor_types import PRESETS
from optrot_edge.terminal import Reporter, print_inspection, print_plan, print_report, print_rotation, print_rows

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Rotate an open LLM with OptRot, quantise it with GPTQ, export it for llama.cpp, "
                       "and measure what was lost.")
settings = {"debug": False, "quiet": False, "json": False}


@app.callback()
def main_options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
                 ctx: typer.Context = None):
    """Options before the command."""
    settings["debug"] = debug
    if process_count() > 1 and ctx.invoked_subcommand not in ("rotate", "quantize", "export"):
        raise InputError(f"torchrun serves rotate, quantize and export; run {ctx.invoked_subcommand} in one process")


Model = Annotated[str, typer.Argument(help="Hugging Face folder or hub id, or a GGUF file.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an unfinished run; without this the same command "
                                                         "goes on where that was stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Rotation = Annotated[str, typer.Option(help="auto (measure, keep the best per byte), none, hadamard, optrot (no data), "
                                            "optrot+ (uses calibration text), or a file saved by `rotate`.")]
Rotate = Annotated[str, typer.Option(help="Which rotations are allowed: a list of r1, r2, r3, r4.")]
Scales = Annotated[bool, typer.Option(help="OptRot+ learns norm gains and channel scales too.")]
PlusObjective = Annotated[str, typer.Option(help="OptRot+ objective: grid (steps of the stored grid) or plain.")]
PlusStart = Annotated[str, typer.Option(help="OptRot+ starts from: native (the model as it is) or hadamard.")]
PlusSteps = Annotated[int, typer.Option(help="OptRot+ steps, each over all layers.")]
R4Block = Annotated[int, typer.Option(help="Block of the online Hadamard R4 (a power of two).")]
Solver = Annotated[str, typer.Option(help="OptRot solver: polar (fast) or cayley (the paper's).")]
Objective = Annotated[str, typer.Option(help="OptRot objective: all matrices, or top-50 (those of largest loss).")]
Steps = Annotated[int | None, typer.Option(help="OptRot steps (default: polar 80, cayley 1000).")]
Rows = Annotated[int | None, typer.Option(help="Rows drawn per OptRot step on average, 0 for all (default: polar 16 "
                                               "per residual channel, cayley all).")]
Tolerance = Annotated[float, typer.Option(help="End OptRot when ten steps lower the loss by less than this fraction "
                                               "(0: never).")]
Target = Annotated[float | None, typer.Option(help="End OptRot when its objective falls to this.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Format = Annotated[str | None, typer.Option(help="Package format: gguf (llama.cpp, the default) or mlx (mlx-lm).")]
Type = Annotated[str | None, typer.Option(
    help=f"Type of the decoder's matrices: {', '.join(GGUF_TYPES)}; llama.cpp's mixes "
         f"{', '.join(PRESETS)}; for MLX see --bits; in checkpoints only: int4-g128-sym and the like (default: "
         f"{DEFAULT_TYPE}).")]
Bits = Annotated[int | None, typer.Option(help=f"MLX: bits per weight, {', '.join(map(str, MLX_BITS))} (default: "
                                               f"{DEFAULT_BITS}).")]
GroupSize = Annotated[int | None, typer.Option(help="MLX: weights that share a scale and a bias, "
                                                    f"{', '.join(map(str, MLX_GROUPS))} (default: {DEFAULT_GROUP}).")]
Dtype = Annotated[str | None, typer.Option(help=f"MLX: what scales, biases and norms are stored in, "
                                                f"{', '.join(DTYPES)} (default: the model's own).")]
MaxMemory = Annotated[str | None, typer.Option(help="Memory to stay within, such as 8GiB or 800MB: activations go to "
                                                    "the disk where they do not fit (default: the machine's).")]
EmbeddingType = Annotated[str | None, typer.Option(help="Type of an untied embedding, for MLX such as 6bit (default: "
                                                        "--type).")]
HeadType = Annotated[str | None, typer.Option(help="Type of the output head, or of the tied matrix (default: q8_0, in "
                                                   "a mix the mix's, for MLX the rest's).")]
TensorType = Annotated[list[str] | None, typer.Option(
    metavar="PATTERN=TYPE", help="Type of the matrices whose name the regular expression finds, such as "
                                 "ffn_down=q6_k or 'blk\\.[0-3]\\.attn_v=q8_0'; repeatable, the first "
                                 "that finds counts.")]
TargetBpw = Annotated[float | None, typer.Option(help="Bits per weight of all tensors together: types by measured KL "
                                                      "per byte, instead of --type.")]
TargetSize = Annotated[str | None, typer.Option(metavar="BYTES", help="The same with a size: 90000000, 90MB or "
                                                "1.5GiB; of the file in export, of the tensors in quantize.")]
Quantizer = Annotated[str, typer.Option(help="gptq or rtn.")]
Calibration = Annotated[str, typer.Option(help="builtin (Python's own help texts), a text file, a hub dataset "
                                               "name[:config], or none (rtn only).")]
ReportText = Annotated[str, typer.Option(help="Text for the report's input statistics: builtin, a text file, a hub "
                                              "dataset name[:config], or none (weights only).")]
MuH = Annotated[bool, typer.Option(help="Report the incoherence of the inputs' covariances too: slow above some "
                                        "8,000 dimensions without a GPU.")]
Nsamples = Annotated[int, typer.Option(help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(help="Tokens per calibration window.")]
Damp = Annotated[float, typer.Option(help="Hessian damping, fraction of its mean diagonal.")]
ActOrder = Annotated[bool, typer.Option(help="Visit columns in order of falling diag(H).")]
Asymmetric = Annotated[str | None, typer.Option(help="GPTQ makes up for errors made before: none, inputs, or residual "
                                                     "(the default: of the inputs and of the residual stream).")]
Refits = Annotated[int, typer.Option(help="How often scales are fitted again once GPTQ has chosen codes.")]
Guidance = Annotated[str, typer.Option(help="none, or tokens: GPTQ weights them by the end loss's gradients.")]
Distill = Annotated[int, typer.Option(help="Epochs in which scales, mins and norm gains learn from the float model on "
                                           "windows besides --nsamples, codes fixed (0: none).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done and what it would take.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="MLX: run the model file that the folder "
                                                                           "brings.")]
VocabFrom = Annotated[Path | None, typer.Option(help="Copy the vocabulary of this GGUF (same tokenizer).")]


def _reporter(quiet: bool, as_json: bool) -> Reporter:
    settings["quiet"], settings["json"] = quiet, as_json
    return Reporter(enabled=not quiet)


def _emit(result: dict, show) -> None:
    """JSON on standard output, or a table unless quiet."""
    if settings["json"]:
        print(json.dumps(result, indent=1))
    elif not settings["quiet"]:
        show(result)


@app.command()
def export(model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id, a GGUF file, or a checkpoint "
                                                     "made by `quantize`.")],
           out: Annotated[Path, typer.Option(help="The package to write.")],
           format: Format = None, type: Type = None, bits: Bits = None, group_size: GroupSize = None,
           dtype: Dtype = None, embedding_type: EmbeddingType = None, head_type: HeadType = None,
           tensor_type: TensorType = None, target_bpw: TargetBpw = None, target_size: TargetSize = None,
           rotation: Rotation = "auto", rotate: Rotate = "r1,r2", scales: Scales = True, r4_block: R4Block = 256,
           optrot_objective: Objective = "all", optrot_solver: Solver = "polar", optrot_steps: Steps = None,
           optrot_rows: Rows = None, optrot_tolerance: Tolerance = 0.0, optrot_target: Target = None,
           plus_objective: PlusObjective = "grid", plus_start: PlusStart = "native", plus_steps: PlusSteps = 30,
           quantizer: Quantizer = "gptq", calibration: Calibration = "builtin", nsamples: Nsamples = 128,
           seqlen: Seqlen = 256, damp: Damp = 0.1, act_order: ActOrder = True,
           asymmetric: Asymmetric = None, refits: Refits = 2, guidance: Guidance = "none",
           distill: Distill = 0, seed: Seed = 0, device: Device = "auto", max_memory: MaxMemory = None,
           checkpoint: Annotated[Path | None, typer.Option(help="Keep the quantised checkpoint here.")] = None,
           vocab_from: VocabFrom = None, dry_run: DryRun = False, overwrite: Overwrite = False,
           restart: Restart = False,
           quiet: Quiet = False, json: Json = False, ctx: typer.Context = None):
    """Rotate, quantise and package MODEL in one step (or package a checkpoint)."""
    from optrot_edge import pipeline

    with _reporter(quiet, json) as reporter:
        fields = _recipe_fields(ctx)
        given = {k: v for k, v in fields.items() if _was_given(ctx, k)}
        fields = (given if pipeline.is_checkpoint(model) else fields) | {"format": format}
        if dry_run:
            return _emit(pipeline.plan(model, packaged=True, vocab_from=vocab_from, **fields), print_plan)
        with stoppable(checkpoint or out.with_name(out.name + ".checkpoint")):
            result = pipeline.export(model, out, overwrite=overwrite, restart=restart,
                                     checkpoint=checkpoint, vocab_from=vocab_from, progress=reporter.update, **fields)
    _emit(result, lambda r: print_rows(r, "Written and verified"))


@app.command()
def quantize(model: Model, out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
             format: Format = None, type: Type = None, bits: Bits = None, group_size: GroupSize = None,
             dtype: Dtype = None, embedding_type: EmbeddingType = None, head_type: HeadType = None,
             tensor_type: TensorType = None, target_bpw: TargetBpw = None, target_size: TargetSize = None,
             rotation: Rotation = "auto", rotate: Rotate = "r1,r2", scales: Scales = True, r4_block: R4Block = 256,
             optrot_objective: Objective = "all", optrot_solver: Solver = "polar", optrot_steps: Steps = None,
             optrot_rows: Rows = None, optrot_tolerance: Tolerance = 0.0, optrot_target: Target = None,
             plus_objective: PlusObjective = "grid", plus_start: PlusStart = "native", plus_steps: PlusSteps = 30,
             quantizer: Quantizer = "gptq", calibration: Calibration = "builtin", nsamples: Nsamples = 128,
             seqlen: Seqlen = 256, damp: Damp = 0.1, act_order: ActOrder = True,
             asymmetric: Asymmetric = None, refits: Refits = 2, guidance: Guidance = "none",
             distill: Distill = 0, seed: Seed = 0, device: Device = "auto", max_memory: MaxMemory = None,
             dry_run: DryRun = False, overwrite: Overwrite = False, restart: Restart = False, quiet: Quiet = False,
             json: Json = False, ctx: typer.Context = None):
    """Rotate and quantise MODEL into a checkpoint that `export` packages.

    With several GPUs: torchrun --nproc-per-node N -m optrot_edge quantize MODEL --rotation optrot
    --out FOLDER; likewise export.
    """
    from optrot_edge import pipeline

    with _reporter(quiet, json) as reporter:
        fields = _recipe_fields(ctx)
        if dry_run:
            return _emit(pipeline.plan(model, **fields), print_plan)
        with stoppable(out):
            began = time.perf_counter()
            path = pipeline.quantize(model, out, overwrite=overwrite, restart=restart, progress=reporter.update,
                                     **fields)
            seconds = round(time.perf_counter() - began, 1)
    if process_rank():
        return  # rank 0 of a torchrun launch reports
    from optrot_edge.inspect import inspect_path

    _emit(inspect_path(path) | {"seconds": seconds}, print_inspection)


@app.command()
def rotate(model: Model, out: Annotated[Path, typer.Option(help="The rotation file (.safetensors) to write.")],
           rotation: Rotation = "optrot", rotate: Rotate = "r1,r2", scales: Scales = True, r4_block: R4Block = 256,
           optrot_objective: Objective = "all", optrot_solver: Solver = "polar", optrot_steps: Steps = None,
           optrot_rows: Rows = None, optrot_tolerance: Tolerance = 0.0, optrot_target: Target = None,
           plus_objective: PlusObjective = "grid", plus_start: PlusStart = "native", plus_steps: PlusSteps = 30,
           calibration: ReportText = "builtin", nsamples: Nsamples = 128, seqlen: Seqlen = 256, mu_h: MuH = True,
           damp: Damp = 0.1, type: Type = "q4_0", seed: Seed = 0, device: Device = "auto",
           overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False, ctx: typer.Context = None):
    """Learn or draw a rotation for MODEL and save it, to be reused with --rotation FILE.

    With several GPUs: torchrun --nproc-per-node N -m optrot_edge rotate MODEL --rotation optrot
    --out FILE.
    A report of what it does to every matrix is written beside it, as .json and .png.
    """
    from optrot_edge import pipeline
    from optrot_edge.rotations.report import read_summary

    with _reporter(quiet, json) as reporter:
        made = pipeline.rotate(model, out, overwrite=overwrite, report=True, mu_h=mu_h, progress=reporter.update,
                               **_recipe_fields(ctx))
    if process_rank():
        return  # rank 0 of a torchrun launch reports
    summary = {"path": str(out), "rotation": made.method, "applied": made.applied,
               **{k: v for k, v in made.recipe.items() if not k.startswith(("layer_", "loss_curve"))},
               "scales": sorted(made.scales), **read_summary(out)}
    _emit(summary, print_rotation)


@app.command("eval")
def evaluate(package: Annotated[Path, typer.Argument(help="A .gguf package, an MLX folder or a checkpoint folder.")],
             reference: Annotated[str, typer.Option(help="The original model, or a file made by `reference`.")],
             text: Annotated[str | None, typer.Option(help="A text file, builtin, or a hub dataset.")] = None,
             windows: Annotated[int | None, typer.Option(help="Windows scored (default: all, at most 32).")] = None,
             window: Annotated[int | None, typer.Option(help="Tokens per window (default: 256).")] = None,
             backend: Annotated[str | None, typer.Option(help="llama.cpp, mlx or torch (default: by kind).")] = None,
             device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
             out: Annotated[Path | None, typer.Option(help="Write the report (JSON) here.")] = None,
             speed: Annotated[bool, typer.Option(help="Also time the runtime.")] = True,
             kv_bits: Annotated[int | None, typer.Option(help="MLX: keep keys and values in 4 or 8 bits.")] = None,
             trust_remote_code: TrustRemoteCode = False,
             quiet: Quiet = False, json: Json = False):
    """Perplexity, KL and top-1 agreement of PACKAGE against its original, in its real runtime."""
    from optrot_edge import pipeline
    from optrot_edge.runtime.evaluate import write_report

    if out is not None:
        pipeline.prepare_output(out, overwrite=True)
    with _reporter(quiet, json) as reporter:
        report = pipeline.evaluate(package, reference, text=text, windows=windows, window=window, backend=backend,
                                   device=device, speed=speed, kv_bits=kv_bits, trust_remote_code=trust_remote_code,
                                   progress=lambda done, total, what: reporter.update(what, done, total, ""))
        if out is not None:
            write_report(out, report)
    _emit(report, print_report)


@app.command()
def chat(package: Annotated[Path, typer.Argument(help="A .gguf package or an MLX folder.")],
         prompt: Annotated[str, typer.Argument(help="The user's message.")],
         max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
         device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
         trust_remote_code: TrustRemoteCode = False, quiet: Quiet = False, json: Json = False):
    """One answer of PACKAGE in its real runtime, by its own chat template, always of the most likely tokens."""
    from optrot_edge import pipeline

    _reporter(quiet, json)
    answer = pipeline.chat(package, prompt, max_tokens=max_tokens, device=device, trust_remote_code=trust_remote_code)
    if json:
        return _emit({"answer": answer}, print)
    print(answer)  # --quiet too: it is what was asked for


@app.command()
def reference(model: Model, text: Annotated[str, typer.Option(help="A file, builtin, or a hub dataset.")],
              out: Annotated[Path, typer.Option(help="The reference file (.json or .json.gz).")],
              windows: Annotated[int | None, typer.Option(help="Windows (default: all, at most 32).")] = None,
              window: Annotated[int | None, typer.Option(help="Tokens per window (default: 256).")] = None,
              top_k: Annotated[int, typer.Option(help="Log-probabilities kept per position.")] = 64,
              device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
              overwrite: Overwrite = False, quiet: Quiet = False, json: Json = False):
    """Score a text with MODEL once, so that devices without torch or MODEL can check a package."""
    from optrot_edge import pipeline

    pipeline.prepare_output(out, overwrite)
    with _reporter(quiet, json) as reporter:
        made = pipeline.write_reference(model, out, text=text, windows=windows, window=window, top_k=top_k,
                                        device=device,
                                        progress=lambda done, total, what: reporter.update(what, done, total, ""))
    summary = {"path": str(out), "windows": made.tokens.shape[0], "window": made.tokens.shape[1],
               "bytes": out.stat().st_size}
    _emit(summary, lambda r: print_rows(r, "Reference"))


@app.command()
def inspect(path: Annotated[str, typer.Argument(help="A model, a checkpoint folder, a GGUF, an MLX folder or a "
                                                      "rotation file.")],
            quiet: Quiet = False, json: Json = False):
    """What a file or folder holds: family, types, bits per weight, recipe, per-layer errors."""
    from optrot_edge.inspect import inspect_path

    _reporter(quiet, json)
    _emit(inspect_path(path), print_inspection)


@app.command()
def doctor(probe: Annotated[bool, typer.Option("--probe", help="Import each library to be sure.")] = False,
           quiet: Quiet = False, json: Json = False):
    """Which runtimes, devices and extras are usable here."""
    from optrot_edge.runtime.doctor import doctor as examine
    from optrot_edge.terminal import print_doctor

    _reporter(quiet, json)
    _emit({"rows": examine(probe)}, print_doctor)


def _recipe_fields(ctx: typer.Context) -> dict:
    """The command's parameters that are fields of a Recipe."""
    import dataclasses

    from optrot_edge.pipeline import Recipe

    names = {field.name for field in dataclasses.fields(Recipe)}
    fields = {name: value for name, value in ctx.params.items() if name in names}
    if fields.get("target_size") is not None:
        fields["target_size"] = parse_size(fields["target_size"])
    return fields


def _was_given(ctx: typer.Context, name: str) -> bool:
    return ctx.get_parameter_source(name).name == "COMMANDLINE"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with the codes of the module's docstring."""
    settings.update(debug=False, quiet=False, json=False)
    warnings.showwarning = _show_warning
    try:
        code = app(arguments, standalone_mode=False)  # None, or typer's: 0 for --help, 130 for Ctrl-C
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = 130
    except Exception as error:  # the last line of defence: one line, unless --debug
        if settings["debug"]:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # click's usage errors
            _fail((error.format_message() or "no command given") + " (see --help)", 2)
        if isinstance(error, InputError):
            _fail(str(error) + (what_is_kept() if isinstance(error, StorageError) else ""), 2)
        if isinstance(error, OSError) and error.filename is not None:
            _fail(f"{error.filename}: {error.strerror}", 2)
        _fail(f"internal failure: {type(error).__name__}: {error} (--debug shows where)" + what_is_kept(), 1)
    if code == 130:
        exec("")  # forgets an interrupt inside another exec: `python -m` would die of it instead of exiting with 130
        _fail("interrupted" + (what_is_kept() or "; nothing half-written was left behind"), 130)
    sys.exit(code or 0)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """One line on standard error, without the source line that raised it."""
    if not settings["quiet"]:
        Console(stderr=True).print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True, style="yellow")


def _fail(message: str, code: int) -> NoReturn:
    errors = Console(stderr=True)
    errors.print("error: ", style="bold red", end="")
    errors.print(" ".join(message.split()), markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
