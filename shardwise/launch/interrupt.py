"""Signals that ask this process to end, as an exception that counts."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.01
"""Seconds between the signals by which one that was lost is sent anew."""


class Interrupted(BaseException):
    """A signal asked this process to end; `exit_code` is 128 + signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """The first SIGTERM, SIGINT or SIGHUP raises Interrupted inside this block, and the others do not disturb what it
    ends; only the main thread gets signals. One that comes amid a destructor, where Python drops what is raised, counts
    as soon as that has ended."""
    main = threading.current_thread()
    if main is not threading.main_thread():
        yield
        return

    raised = over = False
    senders: list[threading.Thread] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised and not _inside(frame, drop):  # where it would be lost once more
            raised = True
            raise Interrupted(signum)

    def drop(unraisable: "sys.UnraisableHookArgs") -> None:
        nonlocal raised
        if isinstance(unraisable.exc_value, Interrupted):
            raised = False
            senders.append(threading.Thread(target=send_again, args=(unraisable.exc_value.signum,), daemon=True))
            senders[-1].start()
        else:
            hook(unraisable)

    def send_again(signum: int) -> None:
        while not (raised or over):
            signal.pthread_kill(main.ident or 0, signum)
            time.sleep(AGAIN)

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    hook, sys.unraisablehook = sys.unraisablehook, drop
    try:
        yield
    finally:
        over = True
        for sender in senders:
            sender.join()
        sys.unraisablehook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _inside(frame: FrameType | None, function: object) -> bool:
    while frame is not None and frame.f_code is not getattr(function, "__code__", None):
        frame = frame.f_back
    return frame is not None
