"""How long an engine's steps take, and in which part: on the host, on the device, in collectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from shardwise.comm import watch
from shardwise.parallel.trace import DECODE, PREFILL, SAMPLE, SCHEDULE, Watcher


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step, or the mean of several."""

    wall: float
    """From the tokens of the step before to this one's."""
    schedule: float
    launch: float
    """Of the host inside the forward pass: on a GPU, until all of it is under way."""
    wait: float
    """Of the host for the tokens; on a GPU the step after this one may be launched before."""
    collectives: float | None
    """Of the host's calls, waiting for peers included; None on a GPU, where they run behind the host's back."""
    device: float | None
    """Of the device's stream from the step's first kernel to its last, None on the CPU."""

    @property
    def other(self) -> float:
        """Of the host between these parts."""
        return max(0.0, self.wall - self.schedule - self.launch - self.wait)


@dataclass(frozen=True, slots=True)
class _Mark:
    begin: int
    end: int
    first: torch.cuda.Event | None
    last: torch.cuda.Event | None

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9


class Clock(Watcher):
    """Watches one rank's engine (`trace.watched_by`). The n-th wait is for the n-th launch, whatever lies between."""

    def __init__(self, device: torch.device, rank: int = 0):
        self._cuda, self._rank = device.type == "cuda", rank
        self._schedules: list[_Mark] = []
        self._launches: list[tuple[str, _Mark]] = []
        self._waits: list[_Mark] = []
        self._collectives: list[float] = []
        self._open: tuple[int, torch.cuda.Event | None] = (0, None)

    def begin(self, name: str) -> None:
        self._open = (watch.now(), self._event() if name in (PREFILL, DECODE) else None)

    def end(self, name: str) -> None:
        begin, first = self._open
        mark = _Mark(begin, watch.now(), first, self._event() if first else None)
        if name == SCHEDULE:
            self._schedules.append(mark)
        elif name == SAMPLE:
            begin = self._waits[-1].end if self._waits else self._schedules[0].begin
            self._collectives.append(self._spent_since(begin))
            self._waits.append(mark)
        else:
            self._launches.append((name, mark))

    def steps(self) -> dict[str, list[StepTimes]]:
        """Of each kind of step, PREFILL (prompts take part) and DECODE, in order."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, list[StepTimes]] = {PREFILL: [], DECODE: []}
        reached = self._schedules[0].begin if self._schedules else 0
        columns = zip(self._schedules, self._launches, self._waits, self._collectives, strict=False)
        for schedule, (kind, launch), wait, collectives in columns:
            device = None
            if launch.first is not None and launch.last is not None:
                device = launch.first.elapsed_time(launch.last) / 1e3
            times = StepTimes(
                wall=(wait.end - reached) / 1e9,
                schedule=schedule.seconds,
                launch=launch.seconds,
                wait=wait.seconds,
                collectives=None if self._cuda else collectives,
                device=device,
            )
            reached = wait.end
            found[kind].append(times)
        return found

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _spent_since(self, begin: int) -> float:
        spent = 0
        for entry in reversed(list(watch.FLIGHT.ring)):
            if entry[watch.BEGIN] < begin:
                break
            if entry[watch.RANK] == self._rank and entry[watch.END]:
                spent += entry[watch.END] - entry[watch.BEGIN]
        return spent / 1e9


def mean(steps: Sequence[StepTimes]) -> StepTimes | None:
    """None of no steps."""
    if not steps:
        return None
    means = {}
    for name in ("wall", "schedule", "launch", "wait", "collectives", "device"):
        values = [value for step in steps if (value := getattr(step, name)) is not None]
        means[name] = fmean(values) if values else None
    return StepTimes(**means)  # type: ignore[arg-type]
