"""The recipe of a checkpoint: every choice that shapes it, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from optrot_edge.checkpoint import FLOAT_TYPES, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.formats import DTYPES, candidates, check_format, full_type, grid_type
from optrot_edge.memory import parse_size
from optrot_edge.rotations.baselines import BASELINES, END_TO_END, EndToEndOptions, refuse_online
from optrot_edge.rotations.options import OptRotOptions
from optrot_edge.tensor_types import base_grid, parse_overrides

ROTATIONS = ("none", "hadamard", "optrot", "optrot+", *BASELINES)
DEFAULT_TYPE = "q4_0"
GUIDANCE = ("none", "tokens")
ASYMMETRIC = ("none", "inputs", "residual")  # what GPTQ makes up for


@dataclass
class Recipe:
    """Every choice that shapes a checkpoint; recorded in its manifest.

    `type` is the body's grid (a GGUF type, or `int4-g128-sym`, `mlx-4bit-g64` and the like; what
    rows cannot be falls back as `optrot_edge.gridspec.fitting_type` says) or a mix
    (`optrot_edge.tensor_types.PRESETS`); None means q4_0. `embedding_type` None means the body's, `head_type` None
    means q8_0, in a mix the mix's, with a float body its type (a tied matrix takes the head's type). `tensor_type`:
    PATTERN=TYPE entries that go before all of these.
    `target_bpw` (bits per weight of all tensors) or `target_size` (their bytes) instead of `type`: types by
    measured KL per byte, see `optrot_edge.budget`; `embedding_type` and `head_type` None are then
    decided with the rest.
    `format` is the package that all this is for, None: gguf. For others than "gguf", `bits` and `group_size` stand
    for `type` (4, and 64 for "mlx", 32 for "onnx", 128 for "gptq"), short names as `8bit` will do, and `dtype` is the
    package's (None: float16, ONNX float32); embedding and head have that type too where no other is given, an ONNX head
    8 bits, GPTQ's both float16; with a target size `group_size` leaves the bits open only. `symmetric`: zero-points of
    "onnx" (None: not) and "gptq" (None: so) lie in the middle. `rotation` is
    none, hadamard, optrot, optrot+, one of `optrot_edge.rotations.baselines` (spinquant, spinquant-w4, spinquant-a4,
    ostquant, kurtail), the path of a saved rotation, or auto, which measures some of the first four;
    `rotate` lists which of r1,r2,r3,r4 are allowed. `scales`: OptRot+ and OSTQuant learn norm gains and channel scales
    too.
    The `optrot_` fields are those of `optrot_edge.rotations.options.OptRotOptions`; None is the solver's own.
    `e2e_steps`, `e2e_tokens` (per step), `e2e_activations` (bits while learning), `e2e_loss` and `e2e_lr` are those of
    `optrot_edge.rotations.baselines.EndToEndOptions`; None: the baseline's own.
    `asymmetric`: GPTQ makes up for errors made before, see `optrot_edge.quantize.asymmetric`; None: as far as it can.
    `refits`: how often scales are fitted again once GPTQ has chosen codes, see `optrot_edge.quantize.refit`.
    `guidance`: "tokens" weights GPTQ's by what the end of the model makes of them, see `optrot_edge.quantize.guidance`.
    `distill`: epochs in which what is not codes learns from the float model, see `optrot_edge.quantize.distill`; on
    up to `nsamples` windows more.
    `max_memory` is a size such as "8GiB", see `optrot_edge.memory`; None: all the machine has. It shapes nothing.
    `calibration` is "builtin", a text file, a hub dataset, or "none" (only with quantizer rtn).
    """

    format: str | None = None
    type: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    dtype: str | None = None
    embedding_type: str | None = None
    head_type: str | None = None
    tensor_type: list[str] = field(default_factory=list)
    target_bpw: float | None = None
    target_size: int | None = None
    rotation: str = "auto"
    rotate: str = "r1,r2"
    scales: bool = True
    r4_block: int = 256
    optrot_objective: str = "all"
    optrot_solver: str = "polar"
    optrot_steps: int | None = None
    optrot_rows: int | None = None
    optrot_tolerance: float = 0.0
    optrot_target: float | None = None
    plus_objective: str = "grid"
    plus_start: str = "native"
    plus_steps: int = 30
    e2e_steps: int = 100
    e2e_tokens: int = 1024
    e2e_activations: int | None = None
    e2e_loss: str | None = None
    e2e_lr: float | None = None
    quantizer: str = "gptq"
    calibration: str = "builtin"
    nsamples: int = 128
    seqlen: int = 256
    damp: float = 0.1
    act_order: bool = True
    asymmetric: str | None = None
    refits: int = 2
    guidance: str = "none"
    distill: int = 0
    seed: int = 0
    device: str = "auto"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        self.rotation, self.calibration = str(self.rotation), str(self.calibration)  # either may be a Path
        self._check_types()
        unknown = self.which - {"r1", "r2", "r3", "r4"}
        if unknown:
            raise InputError(f"--rotate {self.rotate}: unknown {', '.join(sorted(unknown))}; use r1,r2,r3,r4")
        if self.quantizer not in ("gptq", "rtn"):
            raise InputError(f"--quantizer {self.quantizer}: use gptq or rtn")
        if self.calibration == "none" and self.quantizer == "gptq":
            raise InputError("GPTQ needs calibration text; give --calibration, or use --quantizer rtn")
        self._check_asymmetric()
        self._check_rotation()
        self.optrot_options()
        if not 0 < self.damp < 1:
            raise InputError(f"--damp {self.damp}: a fraction between 0 and 1 is needed")
        if self.max_memory is not None:
            parse_size(self.max_memory)
        if self.refits < 0:
            raise InputError(f"--refits {self.refits}: 0 or more is needed")
        if self.guidance not in GUIDANCE or (self.guidance != "none" and self.quantizer == "rtn"):
            raise InputError(f"--guidance {self.guidance}: use {', '.join(GUIDANCE)}; it weights the tokens of gptq")
        if self.distill < 0 or (self.distill and self.calibration == "none"):
            raise InputError(f"--distill {self.distill}: 0 or more epochs, on text (--calibration)")
        if self.nsamples < 1 or self.seqlen < 2:
            raise InputError("--nsamples must be at least 1 and --seqlen at least 2")
        if self.e2e_steps < 1:
            raise InputError(f"--e2e-steps {self.e2e_steps}: at least one is needed")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: 0 or more is needed, and less than 2^63")

    @property
    def has_target(self) -> bool:
        """Whether a size is given instead of a type."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def grid(self) -> str:
        """The grid of most of the body, or a guess before a target size has decided."""
        return base_grid(self.type or DEFAULT_TYPE)

    def candidates(self, width: int) -> list[str]:
        """The types that a target size may give rows of `width` weights."""
        return candidates(width, self.format, self.dtype, self.group_size, self.symmetric)

    @property
    def which(self) -> set[str]:
        """The rotations asked for."""
        return {name.strip().lower() for name in self.rotate.split(",") if name.strip()}

    @property
    def learns_with_data(self) -> bool:
        """Whether the rotation itself needs calibration text."""
        return self.rotation in ("optrot+", "auto", *BASELINES)

    @property
    def learns_for_grid(self) -> bool:
        """Whether the rotation is learned for the body's grid."""
        return self.rotation in ("optrot+", "auto") or (
            self.rotation in END_TO_END and END_TO_END[self.rotation].weights)

    def end_to_end_options(self) -> EndToEndOptions:
        """The `e2e_` fields for a rotation in END_TO_END."""
        options = END_TO_END[self.rotation]
        if self.e2e_lr is not None and self.e2e_lr <= 0:
            raise InputError(f"--e2e-lr {self.e2e_lr}: more than 0 is needed")
        given = {"activations": self.e2e_activations, "loss": self.e2e_loss, "lr": self.e2e_lr}
        return replace(options, steps=self.e2e_steps, tokens=self.e2e_tokens, scales=options.scales and self.scales,
                       **{name: value for name, value in given.items() if value is not None})

    def optrot_options(self) -> OptRotOptions:
        """The `optrot_` fields; InputError for values out of range."""
        rows = "auto" if self.optrot_rows is None else self.optrot_rows
        return OptRotOptions(self.optrot_solver, self.optrot_steps, rows, objective=self.optrot_objective,
                             tolerance=self.optrot_tolerance, target=self.optrot_target)

    def _check_types(self) -> None:
        lower = lambda kind: kind and kind.lower()  # noqa: E731
        self.type, self.embedding_type, self.head_type = map(lower, (self.type, self.embedding_type, self.head_type))
        self.tensor_type = [self.tensor_type] if isinstance(self.tensor_type, str) else list(self.tensor_type or ())
        if isinstance(self.target_size, str):
            self.target_size = parse_size(self.target_size)
        self.format = self.format or "gguf"
        check_format(self.format)
        if self.symmetric is not None and self.format not in ("onnx", "gptq"):
            raise InputError("--symmetric and --no-symmetric are for --format onnx and gptq")
        if self.format != "gguf":
            self._check_affine()
        elif not self.bits == self.group_size == self.dtype is None:
            raise InputError("--bits, --group-size and --dtype are for --format mlx, onnx and gptq; GGUF's types are "
                             "chosen with --type")
        parse_overrides(self.tensor_type)
        for kind in (self.embedding_type, self.head_type):
            if kind is not None and kind not in FLOAT_TYPES:
                grid_spec(kind)
        if not self.has_target:
            self.type = self.type or DEFAULT_TYPE
            base_grid(self.type)
            return
        if self.type is not None:
            raise InputError("--type names the types, --target-bpw and --target-size leave them open: give one of them")
        if self.target_bpw is not None and self.target_size is not None:
            raise InputError("--target-bpw and --target-size say the same twice; give one of them")
        if not (self.target_bpw is None or 0 < self.target_bpw < 32) or (self.target_size or 1) <= 0:
            raise InputError("--target-bpw must be above 0 and below 32, --target-size above 0")
        if self.calibration == "none":
            raise InputError("a target size is met by what calibration measures; give --calibration")

    def _check_affine(self) -> None:
        """Full names of all types of a package that is not GGUF."""
        if self.format == "gptq":  # has no other embedding, and few readers another head
            self.embedding_type, self.head_type = self.embedding_type or "f16", self.head_type or "f16"
        self.dtype = self.dtype or ("float32" if self.format == "onnx" else "float16")
        if self.dtype not in DTYPES[self.format]:
            raise InputError(f"--dtype {self.dtype}: use {', '.join(DTYPES[self.format])}")
        full = lambda kind: kind and full_type(self.format, kind, self.dtype, self.group_size, self.symmetric)  # noqa: E731
        self.type, self.embedding_type, self.head_type = map(full, (self.type, self.embedding_type, self.head_type))
        self.tensor_type = [f"{pattern}={full(kind.strip().lower())}" for pattern, _, kind in
                            (entry.rpartition("=") for entry in self.tensor_type)]
        named = grid_type(self.format, self.bits, self.group_size, self.dtype, self.symmetric)
        if self.type is None and not self.has_target:
            self.type = named
        if self.bits is not None and self.type != named:
            raise InputError("--bits says what --type, --target-bpw and --target-size say too; give one of them")

    def _check_asymmetric(self) -> None:
        able = self.quantizer == "gptq" and self.nsamples > 1 and self.grid not in FLOAT_TYPES
        if self.asymmetric is None:
            self.asymmetric = "residual" if able else "none"
        if self.asymmetric not in ASYMMETRIC:
            raise InputError(f"--asymmetric {self.asymmetric}: use {', '.join(ASYMMETRIC)}")
        if self.asymmetric != "none" and not able:
            raise InputError(f"--asymmetric {self.asymmetric} is for GPTQ of a quantised body on at least two windows "
                             "(--quantizer gptq, --nsamples)")

    def _check_rotation(self) -> None:
        refuse_online(self.rotation)
        if self.rotation in END_TO_END:
            self.end_to_end_options()
        if self.rotation not in (*ROTATIONS, "auto") and not Path(self.rotation).is_file():
            raise InputError(f"--rotation {self.rotation}: neither auto, {', '.join(ROTATIONS)} "
                             "nor a rotation file saved by `optrot-edge rotate`")
        if self.rotation in ("optrot", "optrot+", *BASELINES) and not self.which & {"r1", "r2"} and not (
                self.rotation in ("optrot+", "ostquant") and self.scales):
            raise InputError(f"--rotation {self.rotation} learns R1 and R2, but --rotate names neither")
        if self.learns_with_data and self.calibration == "none":
            raise InputError(f"--rotation {self.rotation} needs calibration text; give --calibration, or choose "
                             "none, hadamard or optrot")
        if self.learns_for_grid and self.grid in FLOAT_TYPES:
            raise InputError(f"--rotation {self.rotation} is for a quantised body; with --type {self.type} use none, "
                             "hadamard, optrot, or a file that `optrot-edge rotate` made for the type to come")
        if self.plus_objective not in ("grid", "plain"):
            raise InputError(f"--plus-objective {self.plus_objective}: use grid or plain")
        if self.plus_start not in ("native", "hadamard"):
            raise InputError(f"--plus-start {self.plus_start}: use native or hadamard")
        if self.plus_steps < 1:
            raise InputError("--plus-steps must be at least 1")
