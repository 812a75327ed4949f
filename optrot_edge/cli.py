"""The command line: `optrot-edge export | rotate | quantize | compare | eval | chat | reference | inspect | doctor`.

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

from optrot_edge import cli_options as opt
from optrot_edge.errors import InputError, StorageError
from optrot_edge.memory import parse_size
from optrot_edge.processes import process_count, process_rank
from optrot_edge.stopping import stoppable, what_is_kept
from optrot_edge.terminal import (
    Reporter,
    print_comparison,
    print_inspection,
    print_plan,
    print_report,
    print_rotation,
    print_rows,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Rotate an open LLM with OptRot, quantise it with GPTQ, export it for llama.cpp, MLX or "
                       "onnxruntime, and measure what was lost.")
settings = {"debug": False, "quiet": False, "json": False}


@app.callback()
def main_options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
                 ctx: typer.Context = None):
    """Options before the command."""
    settings["debug"] = debug
    if process_count() > 1 and ctx.invoked_subcommand not in ("rotate", "quantize", "export"):
        raise InputError(f"torchrun serves rotate, quantize and export; run {ctx.invoked_subcommand} in one process")


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
           out: Annotated[Path, typer.Option(help="The package to write.")], format: opt.Format = None,
           type: opt.Type = None, bits: opt.Bits = None, group_size: opt.GroupSize = None,
           symmetric: opt.Symmetric = None, dtype: opt.Dtype = None, embedding_type: opt.EmbeddingType = None,
           head_type: opt.HeadType = None, tensor_type: opt.TensorType = None,
           target_bpw: opt.TargetBpw = None, target_size: opt.TargetSize = None, rotation: opt.Rotation = "auto",
           rotate: opt.Rotate = "r1,r2", scales: opt.Scales = True, r4_block: opt.R4Block = 256,
           optrot_objective: opt.Objective = "all", optrot_solver: opt.Solver = "polar", optrot_steps: opt.Steps = None,
           optrot_rows: opt.Rows = None, optrot_tolerance: opt.Tolerance = 0.0, optrot_target: opt.Target = None,
           plus_objective: opt.PlusObjective = "grid", plus_start: opt.PlusStart = "native",
           plus_steps: opt.PlusSteps = 30, e2e_steps: opt.E2eSteps = 100, e2e_tokens: opt.E2eTokens = 1024,
           e2e_activations: opt.E2eActivations = None, e2e_loss: opt.E2eLoss = None, e2e_lr: opt.E2eLr = None,
           quantizer: opt.Quantizer = "gptq", calibration: opt.Calibration = "builtin",
           nsamples: opt.Nsamples = 128, seqlen: opt.Seqlen = 256, damp: opt.Damp = 0.1, act_order: opt.ActOrder = True,
           asymmetric: opt.Asymmetric = None, refits: opt.Refits = 2, guidance: opt.Guidance = "none",
           distill: opt.Distill = 0, seed: opt.Seed = 0, device: opt.Device = "auto", max_memory: opt.MaxMemory = None,
           checkpoint: Annotated[Path | None, typer.Option(help="Keep the quantised checkpoint here.")] = None,
           vocab_from: opt.VocabFrom = None, split_max_size: opt.SplitMaxSize = None,
           save_imatrix: opt.SaveImatrix = None, execution_provider: opt.ExecutionProvider = None,
           accuracy_level: opt.AccuracyLevel = None, dry_run: opt.DryRun = False, overwrite: opt.Overwrite = False,
           restart: opt.Restart = False, quiet: opt.Quiet = False, json: opt.Json = False, ctx: typer.Context = None):
    """Rotate, quantise and package MODEL in one step (or package a checkpoint)."""
    from optrot_edge import pipeline

    with _reporter(quiet, json) as reporter:
        fields = _recipe_fields(ctx)
        given = {k: v for k, v in fields.items() if _was_given(ctx, k)}
        fields = (given if pipeline.is_checkpoint(model) else fields) | {"format": format}
        options = {"vocab_from": vocab_from, "split_max_size": split_max_size,
                   "execution_provider": execution_provider, "accuracy_level": accuracy_level}
        if dry_run:
            return _emit(pipeline.plan(model, packaged=True, **options, **fields), print_plan)
        with stoppable(checkpoint or pipeline.checkpoint_of(out)):
            result = pipeline.export(model, out, overwrite=overwrite, restart=restart, checkpoint=checkpoint,
                                     save_imatrix=save_imatrix, progress=reporter.update, **options, **fields)
    _emit(result, lambda r: print_rows(r, "Written and verified"))


@app.command()
def quantize(model: opt.Model, out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
             format: opt.Format = None, type: opt.Type = None, bits: opt.Bits = None, group_size: opt.GroupSize = None,
             symmetric: opt.Symmetric = None, dtype: opt.Dtype = None, embedding_type: opt.EmbeddingType = None,
             head_type: opt.HeadType = None, tensor_type: opt.TensorType = None,
             target_bpw: opt.TargetBpw = None, target_size: opt.TargetSize = None,
             rotation: opt.Rotation = "auto", rotate: opt.Rotate = "r1,r2", scales: opt.Scales = True,
             r4_block: opt.R4Block = 256, optrot_objective: opt.Objective = "all", optrot_solver: opt.Solver = "polar",
             optrot_steps: opt.Steps = None, optrot_rows: opt.Rows = None, optrot_tolerance: opt.Tolerance = 0.0,
             optrot_target: opt.Target = None, plus_objective: opt.PlusObjective = "grid",
             plus_start: opt.PlusStart = "native", plus_steps: opt.PlusSteps = 30, e2e_steps: opt.E2eSteps = 100,
             e2e_tokens: opt.E2eTokens = 1024, e2e_activations: opt.E2eActivations = None,
             e2e_loss: opt.E2eLoss = None, e2e_lr: opt.E2eLr = None,
             quantizer: opt.Quantizer = "gptq", calibration: opt.Calibration = "builtin",
             nsamples: opt.Nsamples = 128, seqlen: opt.Seqlen = 256,
             damp: opt.Damp = 0.1, act_order: opt.ActOrder = True, asymmetric: opt.Asymmetric = None,
             refits: opt.Refits = 2, guidance: opt.Guidance = "none", distill: opt.Distill = 0, seed: opt.Seed = 0,
             device: opt.Device = "auto", max_memory: opt.MaxMemory = None, save_imatrix: opt.SaveImatrix = None,
             dry_run: opt.DryRun = False, overwrite: opt.Overwrite = False, restart: opt.Restart = False,
             quiet: opt.Quiet = False, json: opt.Json = False, ctx: typer.Context = None):
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
            path = pipeline.quantize(model, out, overwrite=overwrite, restart=restart, save_imatrix=save_imatrix,
                                     progress=reporter.update, **fields)
            seconds = round(time.perf_counter() - began, 1)
    if process_rank():
        return  # rank 0 of a torchrun launch reports
    from optrot_edge.inspect import inspect_path

    _emit(inspect_path(path) | {"seconds": seconds}, print_inspection)


@app.command()
def rotate(model: opt.Model, out: Annotated[Path, typer.Option(help="The rotation file (.safetensors) to write.")],
           rotation: opt.Rotation = "optrot", rotate: opt.Rotate = "r1,r2", scales: opt.Scales = True,
           r4_block: opt.R4Block = 256, optrot_objective: opt.Objective = "all", optrot_solver: opt.Solver = "polar",
           optrot_steps: opt.Steps = None, optrot_rows: opt.Rows = None, optrot_tolerance: opt.Tolerance = 0.0,
           optrot_target: opt.Target = None, plus_objective: opt.PlusObjective = "grid",
           plus_start: opt.PlusStart = "native", plus_steps: opt.PlusSteps = 30, e2e_steps: opt.E2eSteps = 100,
           e2e_tokens: opt.E2eTokens = 1024, e2e_activations: opt.E2eActivations = None,
           e2e_loss: opt.E2eLoss = None, e2e_lr: opt.E2eLr = None,
           calibration: opt.ReportText = "builtin", nsamples: opt.Nsamples = 128, seqlen: opt.Seqlen = 256,
           mu_h: opt.MuH = True, damp: opt.Damp = 0.1, type: opt.Type = "q4_0", seed: opt.Seed = 0,
           device: opt.Device = "auto", overwrite: opt.Overwrite = False, quiet: opt.Quiet = False,
           json: opt.Json = False, ctx: typer.Context = None):
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


@app.command()
def compare(model: opt.Model, text: Annotated[str, typer.Option(help="Text to evaluate on: a file, builtin or a hub "
                                                                     "dataset.")],
            out: Annotated[Path, typer.Option(help="Folder for tables, figures, rotations and the journal.")],
            rotations: opt.Rotations = "none,hadamard,optrot", bits: opt.BitsList = "4", group_size: opt.IntGroup = 256,
            grid: opt.IntGrid = "zero", quantizers: opt.Quantizers = "gptq", activations: opt.ActivationsList = "16",
            online: opt.Online = "no", rotate: opt.Fused = "r1,r2", scales: opt.Scales = True,
            r4_block: opt.R4Block = 256, optrot_solver: opt.Solver = "polar", optrot_steps: opt.Steps = None,
            optrot_rows: opt.Rows = None, plus_objective: opt.PlusObjective = "grid",
            plus_start: opt.PlusStart = "native", plus_steps: opt.PlusSteps = 30, e2e_steps: opt.E2eSteps = 100,
            e2e_tokens: opt.E2eTokens = 1024, calibration: opt.TextOnly = "builtin",
            nsamples: opt.Nsamples = 128, seqlen: opt.Seqlen = 256, damp: opt.Damp = 0.01,
            act_order: opt.ActOrder = True, windows: opt.Windows = None, window: opt.Window = None,
            mu_h: opt.MuH = True, tasks: opt.Tasks = None, task_limit: opt.TaskLimit = None,
            max_minutes: opt.MaxMinutes = None, seed: opt.Seed = 0, device: opt.Device = "auto",
            max_memory: opt.MaxMemory = None, restart: opt.Restart = False, quiet: opt.Quiet = False,
            json: opt.Json = False, ctx: typer.Context = None):
    """Measure MODEL under several rotations, as the papers' tables do: KL, perplexity, SNR, figures.

    Rows are rotations × bits × quantizers × online × activations, in torch. The same command goes on after a stop, and
    lists may grow from one run to the next.
    """
    from optrot_edge.compare.comparison import compare as run

    fields = {name: value for name, value in _recipe_fields(ctx).items() if name not in ("bits", "group_size")}
    with _reporter(quiet, json) as reporter, stoppable(out, work=out) as stopped:
        found = run(model, out, text=text, restart=restart, progress=reporter.update, interrupted=stopped,
                    rotations=opt.listed(rotations), bits=opt.listed(bits, int), group_size=group_size, grid=grid,
                    quantizers=opt.listed(quantizers), activations=opt.listed(activations, int), online=online,
                    windows=windows, window=window, mu_h=mu_h, max_minutes=max_minutes,
                    tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()], task_limit=task_limit,
                    fields=fields)
    _emit(found, lambda result: print_comparison(result, out))
    rows = found["rows"]
    failed = next((row for row in rows if row["status"] == "failed"), None)
    if failed and not any(row["status"] == "measured" for row in rows):
        raise InputError(f"no row could be measured; {failed['name']}: {failed['reason']}")


@app.command("eval")
def evaluate(package: Annotated[Path, typer.Argument(help="A .gguf package, an MLX or ONNX folder, or a checkpoint.")],
             reference: Annotated[str, typer.Option(help="The original model, or a file made by `reference` or by "
                                                          "llama-perplexity's --kl-divergence-base.")],
             text: Annotated[str | None, typer.Option(help="A text file, builtin, or a hub dataset.")] = None,
             windows: opt.Windows = None, window: opt.Window = None,
             backend: Annotated[str | None, typer.Option(help="llama.cpp, mlx, onnxruntime or torch (default: by "
                                                              "kind).")] = None,
             device: Annotated[str, typer.Option(help="cpu, cuda or mps; for ONNX dml or webgpu too.")] = "cpu",
             out: Annotated[Path | None, typer.Option(help="Write the report (JSON) here.")] = None,
             speed: Annotated[bool, typer.Option(help="Also time the runtime.")] = True,
             kv_bits: Annotated[int | None, typer.Option(help="MLX: keep keys and values in 4 or 8 bits.")] = None,
             kv_type: Annotated[str | None, typer.Option(help="GGUF: type of the KV cache, such as q8_0, or q8_0,q4_0 "
                                                              "for keys and values (default: f16).")] = None,
             kv_rotation: Annotated[bool, typer.Option(help="GGUF: llama.cpp's own rotation of a quantised KV "
                                                            "cache.")] = True,
             accuracy_level: Annotated[int | None, typer.Option(help="ONNX: 0 (float32 on a CPU) or 4 (int8 "
                                                                     "activations), instead of the stored.")] = None,
             activations: Annotated[int | None, typer.Option(help="In torch: round what the linears read to 8 or 4 "
                                                                  "bits per token.")] = None,
             trust_remote_code: opt.TrustRemoteCode = False,
             quiet: opt.Quiet = False, json: opt.Json = False):
    """Perplexity, KL and top-1 agreement of PACKAGE against its original, in its real runtime."""
    from optrot_edge import pipeline
    from optrot_edge.runtime.evaluate import check_report_place, write_report

    if out is not None:
        check_report_place(out)
        pipeline.prepare_output(out, overwrite=True)
    with _reporter(quiet, json) as reporter:
        report = pipeline.evaluate(package, reference, text=text, windows=windows, window=window, backend=backend,
                                   device=device, speed=speed, kv_bits=kv_bits, trust_remote_code=trust_remote_code,
                                   accuracy_level=accuracy_level, kv_type=kv_type, kv_rotation=kv_rotation,
                                   activations=activations,
                                   progress=lambda done, total, what: reporter.update(what, done, total, ""))
        if out is not None:
            write_report(out, report)
    _emit(report, print_report)


@app.command()
def chat(package: Annotated[Path, typer.Argument(help="A .gguf package, an MLX or an ONNX folder.")],
         prompt: Annotated[str, typer.Argument(help="The user's message.")],
         max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
         device: Annotated[str, typer.Option(help="cpu, cuda or mps; for ONNX dml or webgpu too.")] = "cpu",
         trust_remote_code: opt.TrustRemoteCode = False, quiet: opt.Quiet = False, json: opt.Json = False):
    """One answer of PACKAGE in its real runtime, by its own chat template, always of the most likely tokens."""
    from optrot_edge import pipeline

    _reporter(quiet, json)
    answer = pipeline.chat(package, prompt, max_tokens=max_tokens, device=device, trust_remote_code=trust_remote_code)
    if json:
        return _emit({"answer": answer}, print)
    print(answer)  # --quiet too: it is what was asked for


@app.command()
def reference(model: opt.Model, text: Annotated[str, typer.Option(help="A file, builtin, or a hub dataset.")],
              out: Annotated[Path, typer.Option(help="The reference file (.json, .json.gz, or .kld: llama-perplexity's "
                                                    "--kl-divergence-base).")],
              windows: opt.Windows = None,
              window: Annotated[int | None, typer.Option(help="Tokens per window (default: 256; .kld: 512).")] = None,
              top_k: Annotated[int | None, typer.Option(help="Log-probabilities kept per position (default: 64; .kld: "
                                                             "all).")] = None,
              device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
              trust_remote_code: opt.TrustRemoteCode = False, overwrite: opt.Overwrite = False,
              quiet: opt.Quiet = False, json: opt.Json = False):
    """Score a text with MODEL once, so that devices without torch or MODEL can check a package."""
    from optrot_edge import pipeline

    pipeline.prepare_output(out, overwrite)
    with _reporter(quiet, json) as reporter:
        made = pipeline.write_reference(model, out, text=text, windows=windows, window=window, top_k=top_k,
                                        device=device, trust_remote_code=trust_remote_code,
                                        progress=lambda done, total, what: reporter.update(what, done, total, ""))
    summary = {"path": str(out), "windows": made.tokens.shape[0], "window": made.tokens.shape[1],
               "bytes": out.stat().st_size}
    _emit(summary, lambda r: print_rows(r, "Reference"))


@app.command()
def inspect(path: Annotated[str, typer.Argument(help="A model, a checkpoint folder, a GGUF, an MLX or ONNX folder "
                                                      "or a rotation file.")],
            quiet: opt.Quiet = False, json: opt.Json = False):
    """What a file or folder holds: family, types, bits per weight, recipe, per-layer errors."""
    from optrot_edge.inspect import inspect_path

    _reporter(quiet, json)
    _emit(inspect_path(path), print_inspection)


@app.command()
def doctor(probe: Annotated[bool, typer.Option("--probe", help="Import each library to be sure.")] = False,
           quiet: opt.Quiet = False, json: opt.Json = False):
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
