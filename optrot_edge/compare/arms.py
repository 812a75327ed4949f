"""The arms of a comparison: what each is called, and the recipe it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field

from optrot_edge.rotations.baselines import ACTIVATION_BITS

ACTIVATIONS = tuple(sorted(ACTIVATION_BITS, reverse=True))
"""Bits that the activations can be evaluated in; 16: as they are."""
FEWEST_STEPS = 100
FEWEST_TOKENS = 1024


@dataclass(frozen=True)
class Arm:
    """`label` may have a place for the `bits` of the weights. `rotation` and `fields` are a Recipe's. `per_grid`:
    learned for one grid, so once for every width of the weights. `baseline`: a method of others that learns, whose row
    says whether it was reproduced. `analysis`: its transforms run online, so that there is a model in memory only, see
    `optrot_edge.rotations.analysis`."""

    name: str
    label: str
    rotation: str
    fields: dict = field(default_factory=dict)
    per_grid: bool = False
    baseline: bool = False
    analysis: bool = False

    @property
    def takes_online(self) -> bool:
        """Whether R3 and R4 go with it; else it is one row for both."""
        return self.rotation != "none" and not self.analysis

    def label_at(self, bits: int) -> str:
        """What tables of so many bits call it."""
        return self.label.format(bits=bits)

    def legend(self, bits: int | None) -> str:
        """The same beside other tables' arms: those that learn for one grid say its `bits`, None of the others."""
        return self.label_at(bits) + (f", {bits} bits" if bits and self.label == self.label_at(bits) else "")


_KNOWN = (
    Arm("none", "no rotation", "none"),
    Arm("hadamard", "QuaRot (random Hadamard)", "hadamard"),
    Arm("optrot", "OptRot, all matrices", "optrot", {"optrot_objective": "all"}),
    Arm("optrot-top50", "OptRot, top 50", "optrot", {"optrot_objective": "top-50"}),
    Arm("optrot+", "OptRot+", "optrot+", per_grid=True),
    Arm("spinquant", "SpinQuant", "spinquant", baseline=True),
    Arm("spinquant-w4", "SpinQuant-W{bits}", "spinquant-w4", per_grid=True, baseline=True),
    Arm("spinquant-a4", "SpinQuant-A4", "spinquant-a4", baseline=True),
    Arm("kurtail", "KurTail", "kurtail", baseline=True),
    Arm("ostquant", "OSTQuant", "ostquant", per_grid=True, baseline=True),
    Arm("quip#", "QuIP# (random Hadamards)", "quip#", analysis=True),
    Arm("flatquant", "FlatQuant", "flatquant", baseline=True, analysis=True),
    Arm("butterflyquant", "ButterflyQuant", "butterflyquant", baseline=True, analysis=True),
)
ARMS = {arm.name: arm for arm in _KNOWN}


def learning_of(recipe: dict) -> dict | None:
    """Steps, tokens a step and the loss at the start and the end of what a rotation's `recipe` says; None when nothing
    was learned."""
    if "loss_start" not in recipe:
        return None
    return {"steps": recipe.get("steps_taken", recipe.get("steps")),
            "tokens_per_step": recipe.get("tokens"), "loss_start": recipe["loss_start"],
            "loss": recipe["loss"]}


def not_reproduced(arm: Arm, learning: dict | None) -> str | None:
    """Why the row of a learned baseline says nothing about the method; None when it does."""
    if not arm.baseline:
        return None
    if learning is None:
        return "no record of its learning"
    found = []
    if (learning["steps"] or 0) < FEWEST_STEPS:
        found.append(f"{learning['steps'] or 0} steps, fewer than {FEWEST_STEPS}")
    if (learning["tokens_per_step"] or 0) < FEWEST_TOKENS:
        found.append(f"{learning['tokens_per_step'] or 0} tokens a step, fewer than {FEWEST_TOKENS}")
    if not learning["loss"] < learning["loss_start"]:
        found.append("the loss on held-out text did not fall, so the start was kept")
    return "; ".join(found) or None
