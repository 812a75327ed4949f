"""Split GGUF files: names of their parts, and moving a set of them into place. Needs neither numpy nor torch.

Names and keys are those of llama.cpp's gguf-split: `NAME-00001-of-00003.gguf`; `split.no` counts from 0.
"""

from __future__ import annotations

import re
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.journal import sync_folder

_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 2**16 - 1  # split.count is a uint16


def part_path(out: Path, index: int, count: int) -> Path:
    """Where part `index` (from 0) of `count` of the GGUF `out` lies."""
    return out.with_name(f"{out.name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf")


def siblings(path: Path, index: int, count: int) -> list[Path]:
    """All parts of the set that `path` is part `index` of, by its name; InputError when that is not such a name."""
    found = _NAME.fullmatch(path.name)
    if not found or int(found["number"]) != index + 1 or int(found["count"]) != count:
        raise InputError(f"{path} is part {index + 1} of {count} of a split GGUF, so its name must end in "
                         f"-{index + 1:05d}-of-{count:05d}.gguf, by which the others are found; rename it")
    return [part_path(path.with_name(found["prefix"] + ".gguf"), i, count) for i in range(count)]


def parts_beside(out: Path) -> list[Path]:
    """Parts of any split GGUF called as `out`, in order."""
    prefix = out.name.removesuffix(".gguf")
    if not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.iterdir()
                  if (found := _NAME.fullmatch(path.name)) and found["prefix"] == prefix)


def outputs(out: Path) -> list[Path]:
    """What an export to `out` would replace: the file itself and parts of its name."""
    return [path for path in (out, *parts_beside(out)) if path.exists()]


def move_set(new: Path, out: Path) -> Path:
    """Move the finished GGUF in the folder `new`, one file or all its parts, beside `out`, replacing what lies there.

    The first part is moved last and removed first: whoever finds one finds the whole set. Returns the file to open. A
    failure takes back what was moved.
    """
    files, moved = sorted(new.iterdir()), []
    for path in outputs(out):
        if len(files) > 1 or path.name != files[0].name:  # one file replaces another at once
            path.unlink()
    try:
        for path in reversed(files):
            moved.append(path.replace(out.with_name(path.name)))
    except BaseException:
        for path in moved:
            path.unlink()
        raise
    new.rmdir()
    sync_folder(out.absolute().parent)
    return moved[-1]
