"""Making a rotation: drawn, learned, or loaded; saved, and reported on."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.inputs import CalibrationInputs, Progress
from optrot_edge.processes import process_count, process_rank
from optrot_edge.recipe import ROTATIONS, Recipe
from optrot_edge.rotations.baselines import BASELINES


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """The progress sink when none is given."""


def resolve_device(name: str) -> str:
    """ "auto" to the best device here; InputError when a named one is absent."""
    import torch

    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if usable[device])
    if not usable.get(name, False):
        raise InputError(f"--device {name} is not usable here; usable: "
                         + ", ".join(device for device, there in usable.items() if there))
    return name


def needs_learn() -> None:
    """A readable refusal on a machine that only has the base install."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError('rotating and quantising need torch: pip install "optrot-edge[learn]"') from None


GGUF = b"GGUF"  # what such files begin with


def prepare_output(out: Path, overwrite: bool, magic: bytes = b"") -> None:
    """Make the folder of the file `out`; InputError when it cannot be, or when `out` is taken: at all or (`overwrite`)
    by a file that does not begin with `magic`."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another --out or pass --overwrite")
    if out.is_dir():
        raise InputError(f"{out} is a folder; --out must name a file")
    if magic and out.is_file() and out.stat().st_size:
        with open(out, "rb") as handle:
            begin = handle.read(len(magic))
        if begin != magic:
            raise InputError(f"{out} is no {magic.decode()} file, and --overwrite replaces nothing else; choose "
                             "another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {out.parent}: {error.strerror}") from None


def starting_point(source, recipe: Recipe):
    """The rotation that `recipe` names for an open model, as it is before any learning.

    "auto" stands for a random start with all that is allowed. Raises InputError for blocks that do not fit, a file's
    rotation that is another model's, or what learns in one process under torchrun.
    """
    import torch

    from optrot_edge.rotations.optrot import initial_rotation
    from optrot_edge.rotations.optrot_plus import native_start
    from optrot_edge.rotations.rotation import Rotation

    if recipe.rotation not in (*ROTATIONS, "auto"):
        rotation = Rotation.load(recipe.rotation)
        rotation.validate(source.config)
        if rotation.applied and recipe.which != set(rotation.applied):
            held = ",".join(rotation.applied)
            raise InputError(f"--rotate {recipe.rotate}: {recipe.rotation} holds {held}; pass --rotate {held}")
        return rotation
    if recipe.rotation == "none":
        return Rotation("none")
    if recipe.rotation in ("optrot+", *BASELINES) and process_count() > 1:
        raise InputError(f"--rotation {recipe.rotation} runs in one process; start it without torchrun")
    config, which = source.config, recipe.which
    blocks = {}
    if "r3" in which:
        blocks["r3_block"] = config.head_dim & -config.head_dim  # largest power of two that divides it
    if "r4" in which:
        blocks["r4_block"] = recipe.r4_block
    Rotation("hadamard", **blocks).validate(config)  # before matrices are drawn
    if recipe.rotation == "optrot+" and recipe.plus_start == "native":
        rotation = native_start(config, which, **blocks)
    else:
        rotation = initial_rotation(config, which, torch.Generator().manual_seed(recipe.seed), **blocks)
    rotation.validate(config)
    rotation.recipe["seed"] = recipe.seed
    return rotation


def make_rotation(source, recipe: Recipe, progress: Progress = quiet, *, inputs: CalibrationInputs | None = None):
    """Draw, learn or load the rotation that `recipe` names for an open model `source` ("auto" is not one).

    `inputs` are what is learned from, if anything is; without them they are collected here.
    """
    start = starting_point(source, recipe)
    if recipe.rotation == "optrot":
        return _learn_optrot(source, start, recipe, progress)
    learn = _learn_plus if recipe.rotation == "optrot+" else _learn_baseline if recipe.rotation in BASELINES else None
    if learn is not None:
        with contextlib.ExitStack() as stack:
            if inputs is None:
                inputs = stack.enter_context(CalibrationInputs(source, recipe, resolve_device(recipe.device),
                                                               progress=progress))
            return learn(source, start, recipe, inputs, progress)
    return start


def _learn_optrot(source, start, recipe: Recipe, progress: Progress):
    import torch

    from optrot_edge.rotations.distributed import local_device
    from optrot_edge.rotations.optrot import learn

    return learn(source, start, recipe.optrot_options(), torch.Generator().manual_seed(recipe.seed + 1),
                 device=local_device(resolve_device(recipe.device)),
                 progress=lambda done, total: progress("learn rotation", done, total, ""))


def _learn_plus(source, start, recipe: Recipe, inputs: CalibrationInputs, progress: Progress):
    import torch

    from optrot_edge.rotations.optrot_plus import OptRotPlusOptions, learn_plus

    options = OptRotPlusOptions(recipe.plus_objective, recipe.plus_steps, scales=recipe.scales, damp=recipe.damp)
    return learn_plus(source, start, inputs.body_grid, inputs.covariances, inputs.sensitivity, options,
                      torch.Generator().manual_seed(recipe.seed + 1), device=inputs.device,
                      progress=lambda done, total, loss: progress("learn rotation", done, total, f"loss {loss:.4g}"))


def _learn_baseline(source, start, recipe: Recipe, inputs: CalibrationInputs, progress: Progress):
    import torch

    from optrot_edge.rotations.end_to_end import learn_end_to_end
    from optrot_edge.rotations.kurtail import learn_kurtail

    generator = torch.Generator().manual_seed(recipe.seed + 1)
    show = lambda done, total, loss: progress("learn rotation", done, total, f"loss {loss:.4g}")  # noqa: E731
    if recipe.rotation == "kurtail":
        rotation = learn_kurtail(source, start, inputs.tokens, recipe.e2e_steps, generator, device=inputs.device,
                                 progress=show)
    else:
        grid = inputs.body_grid if recipe.learns_for_grid else recipe.grid
        rotation = learn_end_to_end(source, recipe.rotation, start, grid, inputs.tokens, recipe.end_to_end_options(),
                                    generator, device=inputs.device, progress=show)
    if not rotation.recipe["kept"]:
        progress("learn rotation", 1, 1, "held-out loss did not fall; the start is kept")
    return rotation


def rotate(model: str | Path, out: str | Path, *, overwrite: bool = False, report: bool = False, mu_h: bool = True,
           progress: Progress = quiet, **fields):
    """Learn or draw a rotation for `model` and save it to `out`; `fields` are Recipe's.

    `report` also measures what it does to every matrix and writes that beside `out`, as JSON and as a
    figure (see `optrot_edge.rotations.report`): the inputs' part on the calibration text, unless that is
    "none", and without μ_H if `mu_h` is False. The rotation is saved before its report is made.
    Under torchrun the processes share the learning; only rank 0 writes.
    """
    needs_learn()
    from optrot_edge.models import open_model
    from optrot_edge.rotations.report import report_paths

    if fields.get("calibration") == "none":
        fields.setdefault("quantizer", "rtn")  # nothing is quantised here, so nothing asks for text
    recipe = Recipe(**{"rotation": "optrot"} | fields)
    if recipe.rotation == "auto":
        raise InputError("--rotation auto quantises to choose; use it with quantize or export, or name a rotation")
    source = open_model(model)
    if process_rank():  # of a torchrun launch: rank 0 writes
        return make_rotation(source, recipe)
    for path in (Path(out), *(report_paths(out) if report else ())):
        prepare_output(path, overwrite)
    if recipe.rotation == "none":
        raise InputError("nothing to save: --rotation none rotates nothing")
    starting_point(source, recipe)  # refuses a bad recipe before any work
    with CalibrationInputs(source, recipe, resolve_device(recipe.device), Path(out).parent,
                           progress=progress) as inputs:
        measured = report and recipe.calibration != "none"
        covariances = inputs.covariances if measured else None  # too little text is refused before the learning
        rotation = make_rotation(source, recipe, progress, inputs=inputs)
        rotation.save(out)
        if report:
            about = {"source": recipe.calibration, "sha256": inputs.text_sha256, "nsamples": recipe.nsamples,
                     "seqlen": recipe.seqlen, "seed": recipe.seed,
                     "tokens": recipe.nsamples * recipe.seqlen} if measured else None
            try:
                _report_rotation(out, source, rotation, recipe, covariances, about, mu_h, progress)
            except InputError as error:
                raise InputError(f"{out} is saved, but not its report: {error}") from None
    return rotation


def _report_rotation(out, source, rotation, recipe: Recipe, covariances, about: dict | None, mu_h: bool,
                     progress: Progress) -> None:
    """Measure `rotation` and write its report beside `out`."""
    from optrot_edge.rotations.report import measure, report_paths, summarise, write_report

    for path in report_paths(out):
        path.unlink(missing_ok=True)  # of the rotation that `out` held before
    notes = [] if covariances else ["no calibration text: μ_H and tr D are left out"]
    if covariances and not mu_h:
        notes.append("μ_H is left out, as asked")
    rows = measure(source, rotation, covariances, damp=recipe.damp, act_order=recipe.act_order, mu_h=mu_h,
                   device=resolve_device(recipe.device),
                   progress=lambda done, total: progress("measure matrices", done, total, ""))
    write_report(out, {**rotation.describe(), "model": source.config.name or Path(source.path).stem,
                       "calibration": about, "damp": recipe.damp, "act_order": recipe.act_order,
                       "versions": versions(), "notes": notes, "summary": summarise(rows), "layers": rows})


def versions() -> dict:
    """Versions of what shaped the result."""
    found = {"python": platform.python_version()}
    for name in ("optrot-edge", "torch", "numpy", "gguf", "safetensors", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
