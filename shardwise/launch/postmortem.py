"""After the end: what each rank died of, from exit codes, logs, the kernel's counters and what its peers reported."""

import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from shardwise.launch.backend import Backend
from shardwise.launch.failure import Failure
from shardwise.launch.job import Job
from shardwise.launch.link import Hello

TAIL_BYTES = 6000
OUT_OF_MEMORY = "the kernel's out-of-memory killer was at work in this control group: use more ranks or a smaller dtype"
_FATAL = "Fatal Python error"  # how faulthandler opens its report of a crash
_ENDED_BY_US = (-signal.SIGTERM, -signal.SIGKILL)


def failures(
    job: Job,
    backend: Backend,
    hello: dict[int, Hello],
    phases: dict[int, str],
    *,
    reported: dict[int, Failure],
    died: dict[int, int],
    told: dict[int, int | None],
    finished: set[int],
    stacks: dict[int, str],
    out_of_memory: bool,
) -> list[Failure]:
    """One failure for each rank that failed; never empty.

    reported       what ranks said of themselves
    died           when (ns) a rank's process was seen to end
    told           exit codes as the kernel tells them, where the launcher knows none
    finished       ranks whose function returned
    stacks         stacks of ranks for which others waited in vain
    out_of_memory  the kernel killed for memory while the job ran
    """
    found = {rank: replace(each, log=_existing(job.log(rank))) for rank, each in reported.items()}
    for rank, code in _deaths(backend, died, told, found.keys() | finished).items():
        found[rank] = _from_exit(job, rank, code, hello.get(rank), phases[rank], died.get(rank), out_of_memory)
    for rank in sorted({rank for each in reported.values() for rank in each.missing} - found.keys()):
        found[rank] = _absent(job, rank, hello.get(rank), phases[rank], reported, stacks.get(rank))
    return list(found.values()) or [_launcher_failed(job, backend, hello)]


def stall(
    job: Job,
    hello: dict[int, Hello],
    phases: dict[int, str],
    late: list[int],
    stacks: dict[int, str],
    seconds: float,
    waiting_for: str,
) -> list[Failure]:
    """Failures of the ranks in `late` after `seconds` in which nothing was heard."""
    state = ", ".join(f"rank {rank}: {phase if rank in hello else 'never reported'}" for rank, phase in phases.items())
    what = f"the parent waited {seconds:.3g} s in vain for {waiting_for} ({state})"
    return [_late(job, rank, hello.get(rank), phases[rank], what, stacks.get(rank)) for rank in late]


def _deaths(
    backend: Backend, died: dict[int, int], told: dict[int, int | None], known: Iterable[int]
) -> dict[int, int | None]:
    """Exit code of each rank that ended on its own without a word."""
    exits = {rank: told.get(rank) if code is None else code for rank, code in backend.exits().items()}
    exits = {rank: code for rank, code in exits.items() if rank not in known}
    own = {rank: code for rank, code in exits.items() if code not in _ENDED_BY_US or rank in died}
    if own or known or not died:
        return own
    first = min(died, key=lambda rank: died[rank])  # the launcher named nobody: the first to go, with its code
    return {first: told.get(first) or backend.exit_code() or 1}


def _from_exit(
    job: Job, rank: int, code: int | None, hello: Hello | None, phase: str, when: int | None, out_of_memory: bool
) -> Failure:
    log = tail(job.log(rank))
    crash = log[log.rindex(_FATAL) :] if _FATAL in log else None
    blank = _late(job, rank, hello, phase, spell(code), crash)
    return replace(
        blank,
        exit_code=job_code(code),
        time_ns=when or time.time_ns(),
        hint=hint_for(code, out_of_memory, log, crash),
    )


def _absent(
    job: Job, rank: int, hello: Hello | None, phase: str, reported: dict[int, Failure], stack: str | None
) -> Failure:
    """A rank that others waited for in vain while it lived."""
    waiting = [each for each in reported.values() if rank in each.missing]
    ranks = ", ".join(str(each.rank) for each in waiting)
    call = waiting[0].last_collective or waiting[0].what
    what = f"did not come to {call}, where rank {ranks} waited until the deadline"
    return replace(_late(job, rank, hello, phase, what, stack), time_ns=min(each.time_ns for each in waiting))


def _late(job: Job, rank: int, hello: Hello | None, phase: str, what: str, trace: str | None) -> Failure:
    return Failure(
        rank=rank,
        world=job.world,
        host=hello.host if hello else socket.gethostname(),
        pid=hello.pid if hello else 0,
        phase=phase,
        what=what,
        exit_code=124,
        time_ns=time.time_ns(),
        trace=trace,
        log=_existing(job.log(rank)),
    )


def _launcher_failed(job: Job, backend: Backend, hello: dict[int, Hello]) -> Failure:
    """No rank is to blame: the launcher ended without having started them all."""
    code = backend.exit_code()
    words = backend.error_text() or f"it ended with exit code {code}"
    rank = min(set(range(job.world)) - hello.keys(), default=0)
    blank = _late(job, rank, hello.get(rank), "start", f"{backend.name} did not start the ranks: {words}", None)
    return replace(blank, exit_code=job_code(code), log=None)


def job_code(code: int | None) -> int:
    """The job's exit code for a rank that ended with `code`: 128 + signal, and never 0."""
    return 128 - code if code and code < 0 else code or 1


def spell(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "its process died; the launcher does not know of what"
    if code < 0:
        named = -code in signal.Signals.__members__.values()  # real-time signals have no names, but for two
        return f"killed by {signal.Signals(-code).name if named else f'signal {-code}'}"
    return f"ended with exit code {code}" if code else "ended before its work was done, with exit code 0"


def hint_for(code: int | None, out_of_memory: bool, log: str = "", crash: str | None = None) -> str | None:
    """What may have been behind an end with this code."""
    if code == -signal.SIGKILL:
        if out_of_memory:
            return OUT_OF_MEMORY
        return "somebody killed it; no out-of-memory kill was counted in this control group (dmesg may know more)"
    if crash:
        return "a crash in native code; the Python stack is in the report"
    last = log.strip().splitlines()[-1:]
    return f"last words: {last[0][:200]}" if last else None


def out_of_memory_kills() -> int:
    """How many processes of this control group the kernel has killed for memory; 0 where that is not told."""
    total = 0
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")):
        try:
            words = path.read_text().split()
            total += int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError):
            continue
    return total


def tail(path: Path, start: int = 0) -> str:
    """The end of a log, from byte `start` on."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def size(path: Path) -> int:
    """Bytes of a log, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _existing(path: Path) -> str | None:
    return str(path) if path.exists() else None
