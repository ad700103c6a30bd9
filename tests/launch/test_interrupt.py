"""A signal that asks the process to end counts, and counts once, wherever it comes."""

import signal
import sys
import threading

import pytest

from shardwise.launch.interrupt import Interrupted, interruptible


def test_an_impatient_second_signal_does_not_disturb_the_end():
    before, ended = signal.getsignal(signal.SIGINT), []
    with pytest.raises(Interrupted, match="SIGTERM") as caught, interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            ended.append(True)
    assert caught.value.exit_code == 143 and ended and signal.getsignal(signal.SIGINT) is before


class Deaf:
    """What is raised while it is destroyed, Python drops."""

    dropped = 0

    def __init__(self, wait):
        self.wait = wait

    def __del__(self):
        try:
            self.wait()
        except Interrupted:
            Deaf.dropped += 1
            raise


def test_a_signal_that_comes_amid_destructors_counts_once_they_have_ended(monkeypatch):
    monkeypatch.setattr(Deaf, "dropped", 0)
    hook, handler, lasting = sys.unraisablehook, signal.getsignal(signal.SIGINT), threading.Event()
    with pytest.raises(Interrupted, match="SIGINT"), interruptible():
        Deaf(lambda: signal.raise_signal(signal.SIGINT))
        Deaf(lambda: lasting.wait(60))  # the signal that is sent anew comes amid another one
        assert Deaf.dropped == 2
        lasting.wait(60)
        raise AssertionError("the signal is lost")
    assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == (hook, handler)


def test_what_else_is_dropped_in_a_destructor_is_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with interruptible():
        Deaf(lambda: 1 / 0)
    assert [each.exc_type for each in told] == [ZeroDivisionError]
