"""Signals that ask a run to save and leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from distmoe.runtime import StopSignal


@pytest.fixture
def hang_up() -> Iterator[None]:
    """Whatever a test makes of SIGHUP is taken back."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up")
def test_a_lost_terminal_asks_for_the_end_but_not_under_nohup() -> None:
    noted, under_nohup = StopSignal(), StopSignal()
    # Where it is not taken over, the test itself must live on.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    noted.install()
    os.kill(os.getpid(), signal.SIGHUP)
    noted.restore()
    assert noted.received == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    under_nohup.install()
    os.kill(os.getpid(), signal.SIGHUP)
    under_nohup.restore()
    assert under_nohup.received == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_runs_that_were_refused_leave_short_names() -> None:
    """Each found the handlers of the one before; what it is called must not name them all."""
    signals = [StopSignal() for _ in range(4)]
    for stop_signal in signals:
        stop_signal.install()
    assert len(repr(signals[-1])) < 100
    for stop_signal in reversed(signals):
        stop_signal.restore()
