"""A signal ends a command as an interrupt, whatever a library makes of it."""

import os
import signal

import pytest

from optrot_edge.stopping import stoppable


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stays_one(sent, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), stoppable(tmp_path / "c"):
            try:
                os.kill(os.getpid(), sent)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape of object type") from None
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
    assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]


def test_other_failures_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="mine"), stoppable(tmp_path / "c"):
        raise ValueError("mine")
