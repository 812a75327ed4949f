"""`--rotation auto`: quantise with every rotation that could pay, and keep the best on held-out text per byte.

Arms are judged by KL divergence on windows that were not calibrated on, at equal size: a bit more per weight
divides the squared error of rounding, and with it KL, by 4 (6.02 dB a bit; Bennett 1948), so an arm whose
file takes b bits per original weight costs `KL · 4^b`. Among arms within one standard error of each other the
simplest wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from optrot_edge.journal import remove_folder
from optrot_edge.recipe import Recipe
from optrot_edge.resume import ResumableWriter, WorkFolder

HELD_OUT = 16  # windows that arms are judged on, at most an eighth of those calibrated on
HOPELESS = 2.0  # a size penalty (as a factor of KL) that no measured rotation has made up for
MEASURED = ("kl", "kl_se", "cost", "kl_windows")  # of an Arm
FILLED = "filled"  # name of the note in an arm's journal: it is quantised


@dataclass
class Arm:
    """One candidate: `rotation` and `rotate` as in a Recipe. After measuring: KL (nats, mean of windows) with
    its standard error, stored bits per original weight and their product's figure of merit."""

    name: str
    rotation: str
    rotate: str
    kl: float | None = None
    kl_se: float | None = None
    bits_per_weight: float | None = None
    cost: float | None = None
    skipped: str | None = None
    kl_windows: list[float] = field(default_factory=list, repr=False)


def held_out_windows(recipe: Recipe) -> int:
    """Windows to keep apart for judging."""
    return max(2, min(HELD_OUT, recipe.nsamples // 8))


def candidates(source, recipe: Recipe, stored_bits: Callable[[Arm], float]) -> list[Arm]:
    """The arms for an open model, simplest first; those that R1's extra bytes rule out are marked skipped.

    `stored_bits(arm)` is the size of the arm's tensors in bits.
    """
    from optrot_edge.rotations.fuse import runs_head_mix

    which = [name for name in ("r1", "r2", "r3", "r4") if name in recipe.which]
    rest = [name for name in which if name != "r1"]
    arms = [Arm("none", "none", recipe.rotate)]
    label = ", ".join([name.upper() for name in rest] + ["scales"] * recipe.scales)
    if "r2" in rest or recipe.scales:  # something to learn; on asymmetric grids often better than with R1
        arms.append(Arm(f"OptRot+ ({label})", "optrot+", ",".join(rest)))
    if "r1" in which:
        arms.append(Arm("OptRot", "optrot", recipe.rotate))
        label = ", ".join([name.upper() for name in which] + ["scales"] * recipe.scales)
        arms.append(Arm(f"OptRot+ ({label})", "optrot+", recipe.rotate))
    weights = sum(int(np.prod(shape)) for shape in _shapes(source))
    for arm in arms:
        arm.bits_per_weight = stored_bits(arm) / weights
        extra = arm.bits_per_weight - arms[0].bits_per_weight
        if 4**extra > HOPELESS:
            how = "ties the head through another matrix" if runs_head_mix(recipe.which, recipe.format) else (
                "unties the head from the embedding")
            arm.skipped = (f"R1 {how}: {extra:.2f} more bits per weight, "
                           f"which would have to divide KL by {4**extra:.1f}")
    return arms


def _shapes(source):
    family, config = source.family, source.config
    yield from family.outer_shapes(config).values()
    for _ in range(config.num_hidden_layers):
        yield from family.layer_shapes(config).values()


def quantize_best(source, recipe: Recipe, inputs, writer: ResumableWriter, stored_bits, fill, polish,
                  progress) -> tuple[WorkFolder, str]:
    """Quantise each arm in a work folder of its own and judge it on `inputs.held_out`; returns the best one's folder,
    complete, and the reason.

    `fill(recipe, folder)` quantises by a recipe with an explicit rotation and returns the manifest; what was measured
    is added to the best one's, under "auto", before it goes through `polish(folder, manifest)`. Arms that an
    interrupted run has judged are not made again.
    """
    arms = candidates(source, recipe, stored_bits)
    journal, best = writer.first.journal, None

    def make(arm: Arm) -> tuple[WorkFolder, dict]:
        folder = writer.part(f"arm-{arms.index(arm)}")
        if (manifest := folder.journal.about(FILLED)) is None:
            manifest = fill(replace(recipe, rotation=arm.rotation, rotate=arm.rotate), folder)
            folder.journal.note(FILLED, manifest)
        folder.write_manifest(manifest)
        return folder, manifest

    for index, arm in enumerate(arms):
        if arm.skipped:
            continue
        progress("arm", index, len(arms), arm.name)
        if (measured := journal.about(f"arm-{index}")) is None:
            _measure(arm, source, make(arm)[0].work, inputs, progress)
            measured = {name: getattr(arm, name) for name in MEASURED}
            journal.note(f"arm-{index}", measured)
        for name, value in measured.items():
            setattr(arm, name, value)
        loser = arm
        if best is None or _beats(arm, best):
            best, loser = arm, best
        if loser is not None:
            remove_folder(writer.work / f"arm-{arms.index(loser)}")
    folder, manifest = make(best)
    fields = manifest["recipe"] | {"rotation": recipe.rotation, "rotate": recipe.rotate}
    manifest = manifest | {"recipe": fields, "auto": _summary(arms, best)}
    folder.complete(polish(folder, manifest))
    return folder, manifest["auto"]["why"]


def _measure(arm: Arm, source, folder: Path, inputs, progress) -> None:
    from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
    from optrot_edge.runtime.evaluate import score_windows
    from optrot_edge.runtime.torch_reference import TorchBackend

    tokens = inputs.held_out.numpy().astype(np.int32)
    original = TorchBackend(source, device=inputs.device)
    with TorchBackend(DecodedCheckpoint(folder), device=inputs.device) as runner:
        kl = score_windows(runner, original, tokens, lambda done, total, what: progress("judge", done, total, what)
                           ).window_kl
    arm.kl, arm.kl_windows = float(kl.mean()), kl.tolist()
    arm.kl_se = float(kl.std(ddof=1) / len(kl) ** 0.5)
    arm.cost = arm.kl * 4**arm.bits_per_weight


def _beats(arm: Arm, simpler: Arm) -> bool:
    """Whether `arm` is better than a simpler one by more than a standard error of the paired difference."""
    if not np.isfinite(arm.kl):
        return False
    here = np.array(arm.kl_windows) * 4**arm.bits_per_weight
    gain = np.array(simpler.kl_windows) * 4**simpler.bits_per_weight - here
    return bool(not np.isfinite(simpler.kl) or gain.mean() > gain.std(ddof=1) / len(gain) ** 0.5)


def explain(arms: list[Arm], best: Arm) -> str:
    """One sentence that says what was chosen and why."""
    plain = arms[0]
    said = f"{best.name}: KL {best.kl:.4f} at {best.bits_per_weight:.2f} bits per weight on held-out text"
    if best is not plain and not np.isfinite(plain.kl):
        said += ", where the model without rotation is not finite"
    elif best is not plain:
        said += (f", {best.kl / plain.kl:.2f} times that without rotation "
                 f"({plain.kl:.4f} at {plain.bits_per_weight:.2f})")
    others = [f"{arm.name} {arm.kl:.4f} at {arm.bits_per_weight:.2f}" for arm in arms
              if arm.kl is not None and arm not in (best, plain)]
    if best is plain and others:
        said += "; no rotation was better per byte: " + ", ".join(others)
    elif others:
        said += "; " + ", ".join(others)
    return said + "".join(f"; {arm.name} not tried: {arm.skipped}" for arm in arms if arm.skipped)


def _summary(arms: list[Arm], best: Arm) -> dict:
    """What a manifest says of the choice."""
    rows = [{k: None if isinstance(v, float) and not np.isfinite(v) else v  # JSON has no NaN
             for k, v in asdict(arm).items() if k != "kl_windows"} for arm in arms]
    return {"chosen": best.name, "why": explain(arms, best), "arms": rows}
