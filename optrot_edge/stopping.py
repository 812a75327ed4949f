"""Commands that may be stopped: SIGTERM ends them as Ctrl-C does, and the message says whether they can go on."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from optrot_edge.journal import JOURNAL

_unfinished: dict[str, Path] = {}


@contextlib.contextmanager
def stoppable(checkpoint: Path, *, work: Path | None = None):
    """Around the making of `checkpoint`, in the main thread: remembers what a stop leaves of it, in `work` (by default
    `NAME.partial` beside it). Gives a function that tells whether a signal has come.

    A signal that comes while torch's C++ asks something of Python may come out as another exception; it ends in
    KeyboardInterrupt all the same.
    """
    stopped = False

    def stop(*_):
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    _unfinished.clear()
    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody else's, or ignored
        heard.append(signal.SIGINT)
    former = {number: signal.signal(number, stop) for number in heard}
    try:
        yield lambda: stopped
    except Exception as error:
        if stopped:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        beside = checkpoint.absolute()
        work = work or beside.with_name(beside.name + ".partial")
        if (work / JOURNAL).is_file():
            _unfinished["work"] = work


def what_is_kept() -> str:
    """The end of a message on the command that was stopped last; empty when it left nothing."""
    kept = _unfinished.get("work")
    return f"; what is finished is kept in {kept}, and the same command continues" if kept else ""
