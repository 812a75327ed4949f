"""Real processes that are really killed: children forked from this one, so that torch is imported once."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

KILLED = -signal.SIGKILL


def in_child(work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Exit code of a child that calls `prepare` and `work`: 0, 1 after an exception, KILLED.

    One thread: OpenMP's pool does not survive a fork. Runs that are to be compared all belong in children.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            prepare()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def kill_after(seconds: float) -> Callable[[], None]:
    """A `prepare` that has the child kill itself so much later, wherever it is then."""
    def start():
        threading.Thread(target=lambda: (time.sleep(seconds), _die()), daemon=True).start()
    return start


def kill_at(number: int) -> Callable[[], None]:
    """A `prepare` that has the child kill itself before its `number`th operation that changes a folder's names or
    flushes a file; counted from 0."""
    left = [number]

    def counted(operation):
        def call(*arguments, **options):
            if left[0] == 0:
                _die()
            left[0] -= 1
            return operation(*arguments, **options)
        return call

    def start():
        for owner, names in ((os, ("fsync", "replace", "rename", "unlink")), (shutil, ("rmtree",)),
                             (Path, ("replace", "rename", "unlink", "mkdir"))):
            for name in names:
                setattr(owner, name, counted(getattr(owner, name)))
    return start


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}
