"""QuantizedCheckpoint → GPTQ folder: the frozen codes packed as they are, verified before the folder is named."""

from __future__ import annotations

from pathlib import Path

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.exporters.folder_package import Progress, check_place, write_package
from optrot_edge.exporters.gptq_plan import plan_gptq


def export_gptq(checkpoint: QuantizedCheckpoint, out: str | Path, *, overwrite: bool = False,
                progress: Progress | None = None) -> dict:
    """Write `checkpoint` as the folder `out` that GPTQModel, transformers, vLLM and onnxruntime-genai's model builder
    read, one tensor in memory at a time, and verify it.

    Arguments, result and safety are `export_mlx`'s: `path`, `bytes`, `weights`, `bits_per_weight`, `tensors`, `dtype`
    and `notes` come back; no partial folder stays. Raises InputError for bad input (see `plan_gptq`), a group whose
    zero-point of 0 cannot move (see `gptq_blocks`) and weights beyond float16, StorageError when the disk refuses,
    RuntimeError if what was written is not the checkpoint.
    """
    out = Path(out)
    check_place(out, overwrite, "gptq")
    return write_package(plan_gptq(checkpoint), checkpoint, out, progress)
