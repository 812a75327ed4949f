"""QuantizedCheckpoint → MLX package: the frozen codes packed as they are, verified before the folder is named."""

from __future__ import annotations

from pathlib import Path

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.exporters.folder_package import Progress, check_place, write_package
from optrot_edge.exporters.mlx_plan import MODEL_FILE, plan_mlx


def export_mlx(checkpoint: QuantizedCheckpoint, out: str | Path, *, overwrite: bool = False,
               progress: Progress | None = None) -> dict:
    """Write `checkpoint` as the folder `out` that `mlx_lm.load` reads, one tensor in memory at a time, and verify it.

    `overwrite` replaces a package or an empty folder, nothing else; `progress` is called with (bytes done, bytes in
    all, what was done), where writing and verifying each count every byte once. Returns `path`, `bytes`, `weights`,
    `bits_per_weight` (all tensors over all weights), `tensors` (how many of the model's), `dtype` and `notes`.

    The folder is written as `out` + ".partial", read back and compared with the checkpoint, and renamed; whatever
    fails, Ctrl-C included, no partial folder stays. Raises InputError for bad input (see `plan_mlx`) or an output that
    cannot be written, RuntimeError if what was written is not the checkpoint.
    """
    out = Path(out)
    check_place(out, overwrite, "mlx")
    plan = plan_mlx(checkpoint)
    files = {MODEL_FILE: Path(__file__).with_name("mlx_model_file.py")} if "model_file" in plan.config else None
    return write_package(plan, checkpoint, out, progress, files)
