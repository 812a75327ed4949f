"""The recipe of a checkpoint: every choice that shapes it, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optrot_edge.checkpoint import FLOAT_TYPES, grid_spec
from optrot_edge.errors import InputError

ROTATIONS = ("none", "hadamard", "optrot")


@dataclass
class Recipe:
    """Every choice that shapes a checkpoint; recorded in its manifest.

    `type` is the body's grid (a GGUF type or `int4-g128-sym` and the like); `embedding_type` None
    means the body's, `head_type` None means q8_0 (a tied matrix takes the head's type). `rotation` is
    none, hadamard, optrot, or the path of a saved rotation; `rotate` lists which of r1,r2,r3,r4.
    `calibration` is "builtin", a text file, a hub dataset, or "none" (only with quantizer rtn).
    """

    type: str = "q4_0"
    embedding_type: str | None = None
    head_type: str | None = None
    rotation: str = "optrot"
    rotate: str = "r1,r2"
    r4_block: int = 256
    optrot_solver: str = "polar"
    optrot_steps: int = 60
    optrot_rows: int = 20_000
    quantizer: str = "gptq"
    calibration: str = "builtin"
    nsamples: int = 128
    seqlen: int = 256
    damp: float = 0.1
    act_order: bool = True
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self.rotation, self.calibration = str(self.rotation), str(self.calibration)  # either may be a Path
        self.type = self.type.lower()
        self.embedding_type = (self.embedding_type or self.type).lower()
        self.head_type = (self.head_type or "q8_0").lower()
        for kind in (self.type, self.embedding_type, self.head_type):
            if kind not in FLOAT_TYPES:
                grid_spec(kind)
        unknown = self.which - {"r1", "r2", "r3", "r4"}
        if unknown:
            raise InputError(f"--rotate {self.rotate}: unknown {', '.join(sorted(unknown))}; use r1,r2,r3,r4")
        if self.rotation not in ROTATIONS and not Path(self.rotation).is_file():
            raise InputError(f"--rotation {self.rotation}: neither none, hadamard, optrot "
                             "nor a rotation file saved by `optrot-edge rotate`")
        if self.rotation == "optrot" and not self.which & {"r1", "r2"}:
            raise InputError("--rotation optrot learns R1 and R2, but --rotate names neither")
        if self.quantizer not in ("gptq", "rtn"):
            raise InputError(f"--quantizer {self.quantizer}: use gptq or rtn")
        if self.calibration == "none" and self.quantizer == "gptq":
            raise InputError("GPTQ needs calibration text; give --calibration, or use --quantizer rtn")
        if not 0 < self.damp < 1:
            raise InputError(f"--damp {self.damp}: a fraction between 0 and 1 is needed")
        if self.nsamples < 1 or self.seqlen < 2:
            raise InputError("--nsamples must be at least 1 and --seqlen at least 2")

    @property
    def which(self) -> set[str]:
        """The rotations asked for."""
        return {name.strip().lower() for name in self.rotate.split(",") if name.strip()}
