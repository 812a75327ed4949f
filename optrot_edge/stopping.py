"""Commands that may be stopped: SIGTERM ends them as Ctrl-C does, and the message says whether they can go on."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from optrot_edge.journal import JOURNAL

_unfinished: dict[str, Path] = {}


@contextlib.contextmanager
def stoppable(checkpoint: Path):
    """Around the making of `checkpoint`, in the main thread: remembers what a stop leaves of it."""
    def stop(*_):
        raise KeyboardInterrupt

    _unfinished.clear()
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        work = checkpoint.absolute()
        work = work.with_name(work.name + ".partial")
        if (work / JOURNAL).is_file():
            _unfinished["work"] = work


def what_is_kept() -> str:
    """The end of a message on the command that was stopped last; empty when it left nothing."""
    kept = _unfinished.get("work")
    return f"; what is finished is kept in {kept}, and the same command continues" if kept else ""
