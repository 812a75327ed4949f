"""The options of an OptRot run; needs no torch, so that a recipe can be checked anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optrot_edge.errors import InputError

OBJECTIVES = ("all", "top-50")
STEPS = {"polar": 80, "cayley": 1000}
STEP_SIZE = {"polar": 0.4, "cayley": 1.0}
LARGEST_STEP = 0.7  # radians; beyond, Newton-Schulz may not bring R back to orthogonality
ROWS_PER_CHANNEL = 16  # rows a polar step draws by default, per residual channel
WINDOW = 10  # loss estimates averaged by the stopping rules


@dataclass
class OptRotOptions:
    """`steps` and `lr` None, `rows` "auto": the solver's own (polar: 80 steps, 16 rows per residual channel on
    average, 0.4; cayley: 1000 steps on all rows, 1.0). `rows` None or 0: all rows at every step.

    A run ends early when the estimated loss, averaged over ten steps, reaches `target`, or falls by less than
    the fraction `tolerance` from one ten steps to the next. `memory` is the room for rows in bytes (None: what
    the device can spare). Raises InputError on values out of range.
    """

    solver: str = "polar"
    steps: int | None = None
    rows: int | str | None = "auto"
    lr: float | None = None
    objective: str = "all"
    tolerance: float = 0.0
    target: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.solver not in STEPS:
            raise InputError(f"unknown OptRot solver {self.solver!r}; use polar or cayley")
        if self.objective not in OBJECTIVES:
            raise InputError(f"unknown OptRot objective {self.objective!r}; use {' or '.join(OBJECTIVES)}")
        self.steps = STEPS[self.solver] if self.steps is None else self.steps
        if self.rows == "auto" and self.solver == "cayley":
            self.rows = None
        if self.steps < 1 or (self.rows not in ("auto", None) and not self.rows >= 0):
            raise InputError("OptRot needs at least one step, and a number of rows per step (0: all)")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"OptRot tolerance {self.tolerance}: a fraction from 0 (off) to below 1 is needed")
        if self.target is not None and not self.target > 0:
            raise InputError(f"OptRot target {self.target}: a loss above 0 is needed")
        largest = LARGEST_STEP if self.solver == "polar" else math.inf
        if self.lr is not None and not 0 < self.lr <= largest:
            raise InputError(f"OptRot step size {self.lr}: above 0 and at most {largest} is needed")

    def rows_per_step(self, hidden_size: int) -> int | None:
        """Mean number of rows drawn per step; None for all of them."""
        return ROWS_PER_CHANNEL * hidden_size if self.rows == "auto" else self.rows or None

    def batch(self, step: int, hidden_size: int) -> float:
        """Rows to draw at `step`: from half to one and a half times the mean, because noise hurts last."""
        return self.rows_per_step(hidden_size) * (0.5 + step / max(self.steps - 1, 1))

    def step_size(self, step: int) -> float:
        """Step length at `step`: constant for cayley, a cosine towards 0 for polar."""
        top = STEP_SIZE[self.solver] if self.lr is None else self.lr
        return top if self.solver == "cayley" else top * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def finished(self, losses: list[float]) -> bool:
        """Whether the loss estimates so far end the run."""
        if len(losses) < WINDOW:
            return False
        mean = sum(losses[-WINDOW:]) / WINDOW
        if self.target is not None and mean <= self.target:
            return True
        before = losses[-2 * WINDOW:-WINDOW]
        return self.tolerance > 0 and len(before) == WINDOW and mean > (1 - self.tolerance) * sum(before) / WINDOW
