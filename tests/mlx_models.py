"""Tiny MLX folders, converted by the real mlx_lm in float32 (half precision is slow on a CPU)."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from tests.road import save_model


def edit_config(folder: Path, **changes) -> Path:
    """Set (or, with None, remove) keys of the folder's config.json; returns the folder."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return Path(folder)


def save_float(path: Path, case: str, **options) -> Path:
    """The tiny model of `case` as a Hugging Face folder with a tokenizer, RoPE as transformers 4 wrote it too.

    mlx-lm's llama and qwen2 know no other way (see `MlxBackend`'s warning).
    """
    save_model(path, case, **options)
    rope = json.loads((path / "config.json").read_text())["rope_parameters"]
    scaled = {"rope_scaling": rope} if rope["rope_type"] != "default" else {}
    return edit_config(path, rope_theta=rope["rope_theta"], **scaled)


def convert(source: Path, out: Path, **options) -> Path:
    """`source` through `mlx_lm.convert` with its `options` (quantize, q_bits, q_group_size …)."""
    import mlx_lm

    with contextlib.redirect_stdout(io.StringIO()):
        mlx_lm.convert(str(source), str(out), dtype="float32", **options)
    return Path(out)
