"""The end of a rank's program in MPI mode: MPI_Finalize waits for all ranks, without a limit and without a word.

So a rank first shows in its groups that it comes no more, and finalises MPI when all ranks have done so. Where one
never will, as it waits for this rank in a collective, or hangs, the process ends without: mpirun then ends the job.
"""

import time
import weakref
from collections.abc import Callable
from typing import Protocol

LOOK_SECONDS = 0.01


class Meeting(Protocol):
    """Where the ranks of a group meet."""

    @property
    def whole(self) -> bool:
        """Whether no call on it has failed."""
        ...

    def end(self) -> None:
        """Show the peers that this rank comes no more, as its program has ended."""
        ...

    def peers_left(self) -> bool | None:
        """Whether all peers have left too; None: one never will, it waits for this rank or is gone."""
        ...


_meetings: "weakref.WeakSet[Meeting]" = weakref.WeakSet()
_unusable = False


def register(meeting: Meeting) -> None:
    """`leave_all` asks it."""
    _meetings.add(meeting)


def stay() -> None:
    """MPI has calls under way that no peer will answer, or peers that never leave: it cannot be finalised."""
    global _unusable
    _unusable = True


def leave_all(seconds: float, close: Callable[[], None] = lambda: None) -> bool:
    """`close()`, and leave all groups that are still open. True when all ranks have: MPI may be finalised. False when
    one never will.

    seconds  how long ranks of groups that are broken get to come to their ends; those of the others have work to do
    """
    left = list(_meetings)  # before they are dropped
    close()
    if _unusable:
        return False
    end = time.monotonic() + seconds
    for meeting in left:
        meeting.end()
    while left:
        answers = [meeting.peers_left() for meeting in left]
        late = time.monotonic() > end and not all(meeting.whole for meeting in left)
        if None in answers or late:
            stay()  # a launcher's end asks first, then that of the library: it need not wait once more
            return False
        left = [meeting for meeting, gone in zip(left, answers, strict=True) if not gone]
        if left:
            time.sleep(LOOK_SECONDS)
    return True
