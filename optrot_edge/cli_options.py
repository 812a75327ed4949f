"""Options that several commands of the command line take, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optrot_edge.compare.arms import ARMS
from optrot_edge.errors import InputError
from optrot_edge.formats import BITS, DEFAULT_BITS, DEFAULT_GROUP, DTYPES, GGUF_TYPES, GROUPS
from optrot_edge.recipe import DEFAULT_TYPE
from optrot_edge.tensor_types import PRESETS

Model = Annotated[str, typer.Argument(help="Hugging Face folder or hub id, or a GGUF file.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an unfinished run; without this the same command "
                                                         "goes on where that was stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Rotation = Annotated[str, typer.Option(help="auto (measure, keep the best per byte), none, hadamard, optrot (no data), "
                                            "optrot+ (uses calibration text), the baselines spinquant, spinquant-w4, "
                                            "spinquant-a4, ostquant and kurtail, or a file saved by `rotate`.")]
Rotate = Annotated[str, typer.Option(help="Which rotations are allowed: a list of r1, r2, r3, r4 (GGUF: no r3; "
                                            "with r4 not for llama.cpp's own tools).")]
Scales = Annotated[bool, typer.Option(help="OptRot+ and ostquant learn norm gains and channel scales too.")]
PlusObjective = Annotated[str, typer.Option(help="OptRot+ objective: grid (steps of the stored grid) or plain.")]
PlusStart = Annotated[str, typer.Option(help="OptRot+ starts from: native (the model as it is) or hadamard.")]
PlusSteps = Annotated[int, typer.Option(help="OptRot+ steps, each over all layers.")]
E2eSteps = Annotated[int, typer.Option(help="Steps of spinquant, ostquant and kurtail.")]
E2eTokens = Annotated[int, typer.Option(help="Tokens per step of spinquant and ostquant.")]
E2eActivations = Annotated[int | None, typer.Option(help="Bits of the activations while spinquant and ostquant learn: "
                                                         "4, 8 or 16 (default: the variant's).")]
E2eLoss = Annotated[str | None, typer.Option(help="What they learn from: cross-entropy, or kl-top (from the original, "
                                                  "over its 1,000 likeliest tokens) (default: kl-top).")]
E2eLr = Annotated[float | None, typer.Option(help="Their learning rate at the first step (default: spinquant 30, "
                                                  "its variants 1.5, ostquant 0.02).")]
R4Block = Annotated[int, typer.Option(help="Block of the online Hadamard R4: a power of two that divides the "
                                            "feed-forward length, such as 64, 128, 256 or 512.")]
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
Format = Annotated[str | None, typer.Option(help="Format: gguf (llama.cpp, the default), mlx (mlx-lm), onnx "
                                                 "(onnxruntime, transformers.js) or gptq (GPTQModel, "
                                                 "transformers).")]
Type = Annotated[str | None, typer.Option(
    help=f"Type of the decoder's matrices: {', '.join(GGUF_TYPES)}; llama.cpp's mixes "
         f"{', '.join(PRESETS)}; for the others see --bits; in checkpoints only: int4-g128-sym and the like "
         f"(default: {DEFAULT_TYPE}).")]


def _each(values: dict, separator: str = ", ") -> str:
    """What each format has."""
    return "; ".join(f"{name.upper()} {separator.join(map(str, found)) if isinstance(found, tuple) else found}"
                     for name, found in values.items())


Bits = Annotated[int | None, typer.Option(help=f"Bits per weight: {_each(BITS)} (default: {DEFAULT_BITS}).")]
GroupSize = Annotated[int | None, typer.Option(help=f"Weights that share a scale and an offset: {_each(GROUPS)} "
                                                    f"(default: {_each(DEFAULT_GROUP)}).")]
Symmetric = Annotated[bool | None, typer.Option("--symmetric/--no-symmetric", help="ONNX and GPTQ: zero-points in "
                                                "the middle, or free (default: ONNX free, GPTQ in the middle).")]
Dtype = Annotated[str | None, typer.Option(help=f"What scales and norms are stored in: {_each(DTYPES)} (default: MLX "
                                                "the model's own, ONNX the execution provider's).")]
ExecutionProvider = Annotated[str | None, typer.Option(help="ONNX: what the package is for: cpu (float32; wasm too), "
                                                            "webgpu, cuda or dml (float16) (default: cpu).")]
AccuracyLevel = Annotated[int | None, typer.Option(help="ONNX: activations in MatMulNBits: 0 float, 4 int8 (default: "
                                                        "0).")]
MaxMemory = Annotated[str | None, typer.Option(help="Memory to stay within, such as 8GiB or 800MB: activations go to "
                                                    "the disk where they do not fit (default: the machine's).")]
EmbeddingType = Annotated[str | None, typer.Option(help="Type of an untied embedding; others than GGUF such as 8bit "
                                                        "(default: --type).")]
HeadType = Annotated[str | None, typer.Option(help="Type of the output head, or of the tied matrix (default: q8_0, in "
                                                   "a mix the mix's, with --type f16 f16; ONNX 8 bits, MLX the "
                                                   "rest's, GPTQ f16).")]
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
TextOnly = Annotated[str, typer.Option(help="Text to calibrate on: builtin, a text file, or a hub dataset "
                                            "name[:config].")]
Windows = Annotated[int | None, typer.Option(help="Windows scored (default: all, at most 32).")]
Window = Annotated[int | None, typer.Option(help="Tokens per window (default: 256).")]
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
SplitMaxSize = Annotated[str | None, typer.Option(metavar="SIZE", help="GGUF: split it into files of at most this, "
                                                  "such as 2G or 500M: NAME-00001-of-00003.gguf and so on.")]
SaveImatrix = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write what calibration saw, in the "
                                                  "rotated basis, as an imatrix (.gguf) for llama-quantize --imatrix.")]

Rotations = Annotated[str, typer.Option(help=f"Arms to compare, a list of {', '.join(ARMS)}.")]
BitsList = Annotated[str, typer.Option("--bits", help="Bits per weight, a list of 2 to 8.")]
IntGroup = Annotated[int, typer.Option("--group-size", help="Weights that share a scale; it has to divide every row.")]
IntGrid = Annotated[str, typer.Option("--grid", help="zero (integer zero-points), min (float offsets) or sym "
                                                     "(symmetric).")]
Quantizers = Annotated[str, typer.Option(help="A list of gptq, rtn.")]
ActivationsList = Annotated[str, typer.Option("--activations", help="Bits of activations, a list; 16: as they are.")]
Online = Annotated[str, typer.Option(help="Hadamard R3 and R4 while the model runs: no, yes or both.")]
Fused = Annotated[str, typer.Option(help="Which rotations may be fused into the weights: a list of r1, r2.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Leave out, with a remark, what would not end within this.")]

Tasks = Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-eval, a list such as hellaswag,arc_easy, or of "
                                                "tasks' YAML files; what cannot be had is left out, with a remark.")]
TaskLimit = Annotated[int | None, typer.Option(help="The first items of each task (default: all).")]


def listed(text: str, kind: type = str) -> list:
    """The entries of a list with commas; InputError for one that is not of that kind."""
    try:
        return list(dict.fromkeys(kind(part.strip().lower()) for part in text.split(",") if part.strip()))
    except ValueError:
        raise InputError(f"{text!r}: whole numbers with commas between them are needed") from None
