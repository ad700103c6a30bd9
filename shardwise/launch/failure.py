"""What is known about a failed rank, and which of several failures is the cause.

A rank that dies drags others down: their collectives break or time out. Those are victims. The primary failure is
the earliest one (nanoseconds) among those that no other rank explains.
"""

import contextlib
import json
import os
import shlex
import socket
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shardwise.comm.base import CollectiveMismatch, CollectiveTimeout, CommError, Unavailable

INPUT_ERRORS = (ValueError, FileNotFoundError, IsADirectoryError, PermissionError, NotImplementedError)
"""Errors that their text alone explains: one sentence for the user, the traceback only in failure.json."""
_PEER_WORDS = ("closed by peer", "connection reset", "broken pipe", "connection refused", "socket closed")


@dataclass(frozen=True)
class Failure:
    """One rank's failure. `failure.json` holds this of the culprit, and its victims under `victims`."""

    rank: int
    world: int
    host: str
    pid: int
    phase: str
    """What the rank was doing: starting, joining, planning, loading, generating, …"""
    what: str
    """One sentence: the exception's type and text, the signal, or the exit code."""
    exit_code: int
    """As the job's exit code: the rank's own, 128 + signal, or 124 for a missed deadline."""
    time_ns: int
    victim: bool = False
    """Another rank's failure explains this one."""
    missing: tuple[int, ...] = ()
    """World ranks that this rank waited for in vain."""
    last_collective: str | None = None
    trace: str | None = None
    """The Python traceback, where there was an exception."""
    input_error: bool = False
    hint: str | None = None
    log: str | None = None
    """Path of the rank's log."""
    victims: tuple["Failure", ...] = field(default=())

    @property
    def explained(self) -> bool:
        """Whether its sentence is all that a user needs: what is wrong, or who was waited for. The traceback of such a
        failure is in its report only."""
        return self.input_error or self.victim

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Failure":
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["missing"] = tuple(known.get("missing", ()))
        known["victims"] = tuple(cls.from_json(victim) for victim in known.get("victims", ()))
        return cls(**known)


def from_exception(error: BaseException, *, rank: int, world: int, phase: str, last_collective: str | None) -> Failure:
    """The failure of this process by `error`, which may be a SystemExit or KeyboardInterrupt."""
    # PeerLost names ranks too, but those died of something else.
    missing = error.missing if isinstance(error, CollectiveTimeout) else ()
    return Failure(
        rank=rank,
        world=world,
        host=socket.gethostname(),
        pid=os.getpid(),
        phase=phase,
        what=_sentence(error),
        exit_code=124 if isinstance(error, CollectiveTimeout) else exit_code(error),
        time_ns=time.time_ns(),
        victim=_is_victim(error),
        missing=missing,
        last_collective=last_collective,
        trace="".join(traceback.format_exception(error)),
        input_error=isinstance(error, INPUT_ERRORS),
    )


def exit_code(error: BaseException) -> int:
    """The process exit code that `error` names or Python would give it; never 0: the rank did not finish its work."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return getattr(error, "exit_code", 1)
    return (error.code if isinstance(error.code, int) else 1) or 1


def _sentence(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"SystemExit({error.code!r})"
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_victim(error: BaseException) -> bool:
    if isinstance(error, CollectiveMismatch | Unavailable):  # every member sees it; none is the victim of another
        return False
    names = {cls.__name__ for cls in type(error).__mro__}  # of torch, which must not be imported for this
    if isinstance(error, CommError | ConnectionError) or names & {
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
    }:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER_WORDS)


def primary(failures: Iterable[Failure]) -> Failure | None:
    """The cause among `failures`, with the others as its `victims`; None for none."""
    ordered = sorted(failures, key=lambda failure: (failure.victim, failure.time_ns, failure.rank))
    if not ordered:
        return None
    first, *others = ordered
    return Failure(**{**_shallow(first), "victims": tuple(others)})


def _shallow(failure: Failure) -> dict:
    return {name: getattr(failure, name) for name in Failure.__dataclass_fields__}


def write(folder: Path, failure: Failure) -> Path:
    """Store one rank's failure and renew `failure.json`, the folder's cause with its victims; atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"failure-rank-{failure.rank}.json", failure.to_json())
    told: list[Failure] = []
    while (known := read_all(folder)) != told:  # of two that write at once the last one tells of both
        cause, told = primary(known), known
        assert cause is not None
        _replace(folder / "failure.json", cause.to_json())
    return folder / "failure.json"


def read_all(folder: Path) -> list[Failure]:
    """Failures of all ranks that wrote one into `folder`, by rank. A file that a full disk left empty is none."""
    found = []
    for path in folder.glob("failure-rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Failure.from_json(json.loads(path.read_text())))
    return sorted(found, key=lambda failure: failure.rank)


def forget(folder: Path, rank: int, world: int) -> None:
    """Remove what an earlier job in this folder wrote of `rank`; rank 0 does so for ranks beyond its world too."""
    for path in folder.glob("failure-rank-*.json"):
        if _rank_of(path) == rank or (rank == 0 and _rank_of(path) >= world):
            path.unlink(missing_ok=True)


def _rank_of(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def _replace(path: Path, data: dict) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
    return path


def report(failure: Failure, *, path: Path | None = None, debug: bool = False, sentence: bool = True) -> str:
    """The short text for a terminal: who, where, what, who suffered, where to read more.

    sentence   input errors, which every rank would report alike, are that one sentence
    """
    if failure.input_error and sentence and not debug:
        return f"shardwise: error: {failure.what.split(': ', 1)[-1]}"
    lines = [
        f"shardwise: rank {failure.rank} of {failure.world} failed (host {failure.host}, pid {failure.pid}) "
        f"while {failure.phase}: {failure.what}"
    ]
    if failure.last_collective:
        lines.append(f"  last collective: {failure.last_collective}")
    if failure.hint:
        lines.append(f"  hint: {failure.hint}")
    if failure.victims:
        ranks = ", ".join(str(victim.rank) for victim in failure.victims)
        same = failure.victims[0].what == failure.what
        lines.append(f"  followed by rank {ranks}: {'the same' if same else failure.victims[0].what.splitlines()[0]}")
    if failure.log:
        lines.append(f"  log of the rank: {failure.log}")
    if path:
        lines.append(f"  report: {path} (shardwise explain {shlex.quote(str(path))})")
    if debug and failure.trace:
        lines.append(failure.trace.rstrip())
    return "\n".join(lines)
