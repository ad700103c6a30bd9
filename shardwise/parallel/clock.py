"""How long an engine's steps take, and in which part: on the host, on the device, in collectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from shardwise.comm import watch
from shardwise.parallel.trace import DECODE, PREFILL, SAMPLE, SCHEDULE, Watcher


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step, or the mean of several. `forward` and `sample` are the stream's on a GPU, else the host's."""

    wall: float
    """From the scheduler's begin to the next step's, or to the tokens of the last one."""
    schedule: float
    forward: float
    sample: float
    """Up to the tokens on the host."""
    collectives: float | None
    """Of the host's calls, waiting for peers included; None on a GPU, where they run behind the host's back."""

    @property
    def other(self) -> float:
        """Between the parts: Python, and launching what the device waits for."""
        return max(0.0, self.wall - self.schedule - self.forward - self.sample)


class Clock(Watcher):
    """Watches one rank's engine (`trace.watched_by`)."""

    def __init__(self, device: torch.device, rank: int = 0):
        self._cuda, self._rank = device.type == "cuda", rank
        self._marks: list[tuple[str, int, torch.cuda.Event | None, int, torch.cuda.Event | None]] = []
        self._open: tuple[int, torch.cuda.Event | None] = (0, None)
        self._collectives: list[float] = []

    def begin(self, name: str) -> None:
        self._open = (watch.now(), self._event())

    def end(self, name: str) -> None:
        self._marks.append((name, *self._open, watch.now(), self._event()))
        if name == SAMPLE:
            self._collectives.append(self._spent_since(self._step_begin()))

    def steps(self) -> dict[str, list[StepTimes]]:
        """Of each kind of step, PREFILL (prompts take part) and DECODE, in order."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, list[StepTimes]] = {PREFILL: [], DECODE: []}
        starts = [at for at, mark in enumerate(self._marks) if mark[0] == SCHEDULE]
        for number, at in enumerate(starts):
            parts = self._marks[at : at + 3]
            if len(parts) < 3:
                break
            last = number + 1 == len(starts)
            end = parts[-1][3] if last else self._marks[starts[number + 1]][1]
            schedule, forward, sample = map(self._seconds, parts)
            collectives = None if self._cuda else self._collectives[number]
            times = StepTimes((end - parts[0][1]) / 1e9, schedule, forward, sample, collectives)
            found[parts[1][0]].append(times)
        return found

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: tuple) -> float:
        name, begun, first, ended, last = mark
        if first is None or last is None or name == SCHEDULE:
            return (ended - begun) / 1e9
        return first.elapsed_time(last) / 1e3

    def _step_begin(self) -> int:
        return next(mark[1] for mark in reversed(self._marks) if mark[0] == SCHEDULE)

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
    collectives = [s.collectives for s in steps if s.collectives is not None]
    columns = {name: fmean(getattr(s, name) for s in steps) for name in ("wall", "schedule", "forward", "sample")}
    return StepTimes(**columns, collectives=fmean(collectives) if collectives else None)
