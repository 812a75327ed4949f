"""The published rotations that OptRot is compared with, and the options of their learning; needs no torch.

| name | after | rounded while it learns | loss | learned |
|---|---|---|---|---|
| spinquant | SpinQuant, arXiv 2405.16406 | activations, 8 bits | KL, 1,000 likeliest tokens | R1, R2 |
| spinquant-a4 | the same | activations, 4 bits | the same | R1, R2 |
| spinquant-w4 | the same | weights, on the body's grid | the same | R1, R2 |
| ostquant | OSTQuant, arXiv 2501.13987 | both | the same | R1, R2, scales |
| kurtail | KurTail, arXiv 2503.01483 | nothing | kurtosis, see `kurtail` | R1, R2 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from optrot_edge.errors import InputError

ACTIVATION_BITS = (4, 8, 16)
LOSSES = ("cross-entropy", "kl-top")


@dataclass(frozen=True)
class EndToEndOptions:
    """How a rotation is learned through the whole network, see `optrot_edge.rotations.end_to_end`.

    `activations`: bits they are rounded to (16: not); `weights`: whether the body's are rounded on its grid; `loss`:
    "cross-entropy" or "kl-top"; `solver`: "cayley" (SGD) or "adam"; `scales`: learn channel scales too;
    `through_range`: gradients through the steps, besides those straight through the rounding; `steps` of `tokens`
    each; `lr` and `scale_lr` fall linearly to 0. Raises InputError on values out of range.
    """

    activations: int = 8
    weights: bool = False
    loss: str = "kl-top"
    solver: str = "cayley"
    scales: bool = False
    through_range: bool = True
    steps: int = 100
    tokens: int = 1024
    lr: float = 1.5
    scale_lr: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens < 2:
            raise InputError("--e2e-steps must be at least 1 and --e2e-tokens at least 2")
        if self.activations not in ACTIVATION_BITS:
            raise InputError(f"--e2e-activations {self.activations}: use 4, 8 or 16")
        if self.loss not in LOSSES:
            raise InputError(f"--e2e-loss {self.loss}: use {' or '.join(LOSSES)}")
        if not math.isfinite(self.lr):
            raise InputError(f"--e2e-lr {self.lr}: a step size is needed")
        if not self.weights and self.activations == 16:
            raise InputError("--e2e-activations 16 rounds nothing that this rotation could learn from")


END_TO_END = {
    "spinquant": EndToEndOptions(lr=30.0),
    "spinquant-a4": EndToEndOptions(activations=4),
    "spinquant-w4": EndToEndOptions(activations=16, weights=True),
    "ostquant": EndToEndOptions(weights=True, solver="adam", scales=True, lr=0.02),
}
BASELINES = (*END_TO_END, "kurtail")
ONLINE = {"flatquant": "FlatQuant's learned matrices", "butterflyquant": "ButterflyQuant's learned rotations",
          "quip#": "QuIP#'s Hadamard transforms"}
"""Published methods whose transforms no package can hold, see `optrot_edge.rotations.analysis`."""


def refuse_online(rotation: str) -> None:
    """InputError for a method that cannot be fused."""
    if rotation in ONLINE:
        raise InputError(f"--rotation {rotation}: {ONLINE[rotation]} act on every linear's input while the model runs; "
                         "they cannot be fused into the weights, so no package holds them. Use it in `compare` only")
