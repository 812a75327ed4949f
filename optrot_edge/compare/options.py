"""What a comparison measures: its rows, and the recipe behind each of them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path

from optrot_edge.compare.arms import ACTIVATIONS, ARMS, Arm
from optrot_edge.errors import InputError
from optrot_edge.gridspec import grid_spec
from optrot_edge.recipe import Recipe

GRIDS = ("zero", "min", "sym")
ONLINE = {"no": (False,), "yes": (True,), "both": (False, True)}
QUANTIZERS = ("gptq", "rtn")
PLAIN = {"embedding_type": "f16", "head_type": "f16", "asymmetric": "none", "refits": 0}
"""What the papers leave alone: embedding and head stay float, and GPTQ is as it was published."""


@dataclass(frozen=True)
class Build:
    """One quantised model: an arm, bits of its weights, a quantiser, and whether R3 and R4 run online."""

    arm: str
    bits: int
    quantizer: str
    online: bool

    @property
    def name(self) -> str:
        """As files and journals call it."""
        return f"{self.arm}-w{self.bits}-{self.quantizer}" + ("-online" if self.online else "")

    @property
    def rotation(self) -> str:
        """The same of the rotation that it shares with others."""
        per_grid = f"-w{self.bits}" if ARMS[self.arm].per_grid else ""
        return self.arm + per_grid + ("-online" if self.online else "")


@dataclass(frozen=True)
class Row:
    """A build, evaluated with activations of so many bits."""

    build: Build
    activations: int

    @property
    def name(self) -> str:
        """As journals call it."""
        return f"{self.build.name}-a{self.activations}"

    @property
    def transforms(self) -> str:
        """The same of what an analysis arm learns, which serves both quantisers."""
        return f"{self.build.arm}-w{self.build.bits}-a{self.activations}"


@dataclass
class CompareOptions:
    """`rotations`: arms by name. `bits`, `quantizers`, `activations` and `online` ("no", "yes", "both") make rows of
    each. `group_size` and `grid` ("zero": integer zero-points, "min": float offsets, "sym") are those of all grids.
    `windows` of `window` tokens are evaluated (see `cut_windows`). `mu_h`: measure eigenvectors too. `max_minutes`:
    what would take longer, counted from the start of the run, is left out. `tasks`: zero-shot tasks of lm-eval, the
    first `task_limit` items of each (see `optrot_edge.runtime.zero_shot`). `fields`: Recipe's, of every build.

    Raises InputError for what there is not.
    """

    rotations: list[str]
    bits: list[int] = field(default_factory=lambda: [4])
    group_size: int = 256
    grid: str = "zero"
    quantizers: list[str] = field(default_factory=lambda: ["gptq"])
    activations: list[int] = field(default_factory=lambda: [16])
    online: str = "no"
    windows: int | None = None
    window: int | None = None
    mu_h: bool = True
    max_minutes: float | None = None
    tasks: list[str] = field(default_factory=list)
    task_limit: int | None = None
    fields: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, given, known in (("--rotations", self.rotations, tuple(ARMS)), ("--grid", [self.grid], GRIDS),
                                     ("--quantizers", self.quantizers, QUANTIZERS), ("--online", [self.online], ONLINE),
                                     ("--activations", self.activations, ACTIVATIONS),
                                     ("--bits", self.bits, range(2, 9))):
            unknown = [str(value) for value in given if value not in known]
            if unknown or not given:
                raise InputError(f"{option} {','.join(unknown)}: use {', '.join(map(str, known))}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(f"--max-minutes {self.max_minutes}: more than 0 is needed")
        if self.task_limit is not None and self.task_limit < 1:
            raise InputError(f"--task-limit {self.task_limit}: at least 1 is needed")
        if self.task_limit is not None and not self.tasks:
            raise InputError("--task-limit is the number of items of each of --tasks; name some")
        if self.group_size < 1:
            raise InputError(f"--group-size {self.group_size}: at least 1 is needed")
        if self.fields.get("calibration") == "none":
            raise InputError("a comparison measures the inputs of every layer: --calibration none will not do")
        if {"r3", "r4"} & {name.strip().lower() for name in self.fields.get("rotate", "").split(",")}:
            raise InputError("--rotate names what fuses into the weights, r1 and r2; for r3 and r4 use --online")
        for build in self.builds():
            grid_spec(self.type(build.bits))
            if not ARMS[build.arm].analysis:
                self.rotation_recipe(build)

    def type(self, bits: int) -> str:
        """Name of the grid of so many bits."""
        return f"int{bits}-g{self.group_size}-{self.grid}"

    def builds(self) -> list[Build]:
        """Every model to quantise, in the order of the tables."""
        found = itertools.product(self.bits, self.quantizers, ONLINE[self.online], self.rotations)
        return list(dict.fromkeys(Build(arm, bits, quantizer, online and ARMS[arm].takes_online)
                                  for bits, quantizer, online, arm in found))

    def rows(self) -> list[Row]:
        """Every row, in that order."""
        return [Row(build, activations) for build in self.builds() for activations in dict.fromkeys(self.activations)]

    def rotation_recipe(self, build: Build) -> Recipe:
        """The recipe that a build's rotation is made by; of an analysis arm that of the unrotated model."""
        arm: Arm = ARMS["none" if ARMS[build.arm].analysis else build.arm]
        which = self.fields.get("rotate", "r1,r2") + (",r3,r4" if build.online else "")
        return Recipe(**PLAIN | self.fields | arm.fields | {"type": self.type(build.bits), "rotation": arm.rotation,
                                                            "rotate": which})

    def quantizing(self, build: Build) -> dict:
        """Fields of the recipe that a build is quantised by, its rotation given. Rounding to nearest sees no text: its
        scales fit the weights alone."""
        text = {"calibration": "none"} if build.quantizer == "rtn" else {}
        return PLAIN | self.fields | {"type": self.type(build.bits), "quantizer": build.quantizer} | text

    def settings(self, fields: dict, text_sha256: str) -> dict:
        """What all rows share, for a fingerprint that has the texts by content; `fields` are a Recipe's."""
        own = {"group_size": self.group_size, "grid": self.grid, "windows": self.windows, "window": self.window,
               "text": text_sha256, "mu_h": self.mu_h}
        dropped = {"type", "rotation", "rotate", "quantizer", "optrot_objective"}
        return {name: value for name, value in fields.items() if name not in dropped} | {
            "calibration": Path(fields["calibration"]).name, "rotate": self.fields.get("rotate", "r1,r2")} | own

    def recorded(self) -> dict:
        """JSON of the lists that make the rows."""
        names = ("rotations", "bits", "quantizers", "activations", "online")
        return {name: value for name, value in dataclasses.asdict(self).items() if name in names}
