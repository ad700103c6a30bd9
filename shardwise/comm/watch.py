"""Deadlines, phases and the flight record of all transports. Free of torch.

Every wait of the package is bounded by a field of `Deadlines`. The flight record is a ring of the last
collectives that this process began; a collective whose `end` is missing is the one that hangs.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NoReturn

FLIGHT_LENGTH = 256
ROLL_CALL_SECONDS = 1.5
"""How long a rank whose wait gave up hears who else waits: the others' deadlines end a little later."""
LONGEST = 1_000_000
"""Seconds of a wait: the system counts some waits in milliseconds, up to 2**31."""
LOG_FOLDER_ENV = "SHARDWISE_LOG_DIR"


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """Seconds after which a wait gives up. `SHARDWISE_DEADLINE_<FIELD>` in the environment overrides a field."""

    start: float = 120.0
    """From starting a worker process until it reports."""
    rendezvous: float = 120.0
    """All ranks have joined a group."""
    load: float = 1800.0
    """A collective while some rank may still be reading weights (phase `load`)."""
    collective: float = 300.0
    """Any other collective: from this rank's arrival to the last one's."""
    stop: float = 10.0
    """From asking a worker to end until it is killed."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= LONGEST:
                raise ValueError(
                    f"{env_name(field.name)}={value}: a deadline is a number of seconds above 0, at most {LONGEST}"
                )

    @classmethod
    def from_environment(cls, environ=os.environ) -> "Deadlines":
        """Defaults, overridden by the environment. Raises ValueError for a value that no deadline has, and for a
        deadline that is not known."""
        legal = [env_name(field.name) for field in fields(cls)]
        for name in environ:
            if name.startswith(env_name("")) and name not in legal:
                raise ValueError(f"{name} is not a deadline; legal: {', '.join(legal)}")
        given = {}
        for field in fields(cls):
            text = environ.get(env_name(field.name))
            if text is not None:
                given[field.name] = _seconds(env_name(field.name), text)
        return cls(**given)

    def in_phase(self, name: str) -> float:
        """How long a collective may wait for its peers while this process is in phase `name`."""
        if name != "load":
            return self.collective
        return max(self.load, self.collective)


def env_name(field: str) -> str:
    """Environment variable of a `Deadlines` field."""
    return "SHARDWISE_DEADLINE_" + field.upper()


def _seconds(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number of seconds") from None


def _say_and_end(error: BaseException) -> NoReturn:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(124)


give_up: Callable[[BaseException], NoReturn] = _say_and_end
"""Ends this process, whose main thread is inside native code where no exception reaches it; whoever guards a rank
reports it first."""

_phase = "start"


def current_phase() -> str:
    """What this process is doing: start, rendezvous, load, run, stop, or a caller's own word."""
    return _phase


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what the process does inside the block; left set when the block raises, so that reports can name it."""
    global _phase
    before, _phase = _phase, name
    yield
    _phase = before


# Places in a flight entry, a plain list: appending one costs 0.2 µs, an object with attributes three times that.
SEQUENCE, OP, SHAPE, DTYPE, STRATEGY, GROUP, RANK, BEGIN, END = range(9)


class FlightRecord:
    """Ring of the last collectives of this process, in the order in which they began."""

    def __init__(self, length: int = FLIGHT_LENGTH):
        self.ring: deque[list] = deque(maxlen=length)
        self._writing = threading.Lock()

    def rows(self) -> list[dict]:
        """Oldest first. `begin` and `end` are nanoseconds of the monotonic clock; end 0: still pending."""
        return [_row(entry) for entry in list(self.ring)]

    def last(self, rank: int | None = None) -> dict | None:
        """The collective begun last (by world rank `rank` where ranks are threads)."""
        for entry in reversed(list(self.ring)):
            if rank is None or entry[RANK] == rank:
                return _row(entry)
        return None

    def dump(self, rank: int) -> str | None:
        """Write the record into the folder `SHARDWISE_LOG_DIR`; returns the path, or None where that is not set, or
        takes no file: whoever dumps has an error of its own to tell."""
        folder = os.environ.get(LOG_FOLDER_ENV)
        if not folder:
            return None
        path = os.path.join(folder, f"flight-rank{rank}.json")
        try:
            with self._writing:
                os.makedirs(folder, exist_ok=True)
                with open(path, "w") as file:
                    json.dump({"rank": rank, "phase": current_phase(), "collectives": self.rows()}, file, indent=1)
        except OSError:
            return None
        return path


def _row(entry: list) -> dict:
    return {
        "sequence": entry[SEQUENCE],
        "op": entry[OP],
        "shape": list(entry[SHAPE]),
        "dtype": str(entry[DTYPE]).removeprefix("torch."),
        "strategy": entry[STRATEGY],
        "group": entry[GROUP],
        "rank": entry[RANK],
        "begin": entry[BEGIN],
        "end": entry[END],
    }


FLIGHT = FlightRecord()
now = time.monotonic_ns


def process_alive(pid: int, started: int) -> bool:
    """True while process `pid` that started at clock tick `started` runs; a zombie counts as gone."""
    state = _process_state(pid)
    return state is not None and state[0] not in "ZX" and state[1] == started


def process_start(pid: int) -> int:
    """Clock tick at which `pid` started: together with the pid a name that is never used twice."""
    state = _process_state(pid)
    if state is None:
        raise ProcessLookupError(f"no process {pid}")
    return state[1]


def process_age_ns(pid: int) -> int:
    """Nanoseconds since `pid` started, in steps of a clock tick."""
    ticks = process_start(pid)
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK")


def _process_state(pid: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()  # the name before may hold blanks and brackets
    except OSError:
        return None
    return values[0].decode(), int(values[19])


def environment_flag(name: str) -> bool:
    """True for 1, true, yes, on; False when unset or 0, false, no, off. Raises ValueError otherwise."""
    text = os.environ.get(name, "0").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "", "false", "no", "off"):
        return False
    raise ValueError(f"{name}={text!r}: legal are 1 and 0")
