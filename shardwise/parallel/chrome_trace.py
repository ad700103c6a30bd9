"""A few steps of an engine as a Chrome trace: one gzipped file a rank, which Perfetto opens, alone or all together.

torch.profiler records operators and kernels. On top come the engine's spans, and the collectives from the flight record
on a row of their own. Every event's pid is the rank, so that the files of a job can be laid over each other.
"""

import gzip
import json
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from shardwise.comm import watch
from shardwise.parallel.trace import DECODE, PREFILL, SAMPLE, Watcher

DECODE_STEPS = 6
"""Every step is like the last."""
STEPS = 24
"""With those of long prompts: an eager step of 36 layers is half a MB of JSON, a tenth of that when compressed."""
COLLECTIVES_ROW = 1
_MARK = "shardwise clock"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class ChromeTrace(Watcher):
    """Records the first steps that it watches (`trace.watched_by`) and writes them once DECODE_STEPS are among them.

    name   what the rank's row is called in the trace
    """

    def __init__(self, folder: Path, rank: int, name: str, device: torch.device):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank}.json.gz"
        self._rank, self._name = rank, name
        self._steps = self._decode_steps = 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile: profile | None = profile(activities=activities)
        self._profile.start()
        self._marks: list[tuple[int, int]] = []
        """Ties between the flight record's clock and the profiler's: begin and end of spans, in nanoseconds."""
        for _ in range(5):
            begin = watch.now()
            with record_function(_MARK):
                pass
            self._marks.append((begin, watch.now()))
        self._span: record_function | None = None

    def begin(self, name: str) -> None:
        if self._profile is not None:
            self._span = record_function(name)
            self._span.__enter__()

    def end(self, name: str) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None
        self._steps += name == SAMPLE
        self._decode_steps += name == DECODE
        if name == SAMPLE and (self._decode_steps >= DECODE_STEPS or self._steps == STEPS):
            self.close()

    def close(self) -> None:
        """Stop and write, if that is not done yet."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        ended = watch.now()
        recorded.stop()
        with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
            raw = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(raw))
            document = json.loads(raw.read_bytes())
        document["traceEvents"] = self._events(document["traceEvents"], ended)
        with gzip.open(self.path, "wt", compresslevel=4) as file:
            json.dump(document, file)

    def _events(self, events: list[dict], ended: int) -> list[dict]:
        """The profiler's events under this rank's number, without its own names of processes, and the collectives."""
        marked = sorted(event["ts"] for event in events if event.get("name") == _MARK)
        ties = zip(reversed(self._marks), reversed(marked), strict=False)
        (begin, _), ts = min(ties, key=lambda tie: tie[0][1] - tie[0][0])  # the quickest: no other process came between
        shift = ts - begin / 1e3
        kept = [
            {**event, "pid": self._rank}
            for event in events
            if event.get("name") not in (_MARK, "process_name", "process_labels", "process_sort_index")
            and not str(event.get("pid", "")).startswith(("Spans", "Traces"))
        ]
        calls = [self._call(row, shift) for row in watch.FLIGHT.rows() if self._marks[-1][1] <= row["begin"] <= ended]
        return [
            self._label("process_name", name=f"rank {self._rank}: {self._name}"),
            self._label("process_sort_index", sort_index=self._rank),
            self._label("thread_name", tid=COLLECTIVES_ROW, name="collectives"),
            *kept,
            *[call for call in calls if call["args"]["rank"] == self._rank],
        ]

    def _label(self, kind: str, tid: int = 0, **args: object) -> dict:
        return {"ph": "M", "name": kind, "pid": self._rank, "tid": tid, "args": args}

    def _call(self, row: dict, shift: float) -> dict:
        end = row["end"] or row["begin"]
        shape = "x".join(map(str, row["shape"]))
        return {
            "ph": "X",
            "cat": "collective",
            "name": f"{row['op']} {shape} {row['dtype']}".strip(),
            "pid": self._rank,
            "tid": COLLECTIVES_ROW,
            "ts": row["begin"] / 1e3 + shift,
            "dur": (end - row["begin"]) / 1e3,
            "args": row,
        }


@dataclass(frozen=True)
class DeviceWork:
    """What a GPU did in the decode steps of a trace."""

    steps: int
    seconds: float
    """From the tokens of the step before to each one's, summed."""
    by_name: dict[str, tuple[int, float]]
    """Kernels and copies: how many, and their seconds, each counted from the end of all that began before it, summed.

    A kernel may be resident while the one before still runs (dependent launch, other streams), so lengths overlap;
    these shares add up to the time in which the device was busy.
    """
    overlapped: float
    """Seconds by which their whole lengths add up to more."""


def decode_work(path: Path) -> DeviceWork:
    """Between the tokens of one decode step and those of the next the device does one step's work."""
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X" and "cat" in event]
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e["cat"] == "user_annotation")
    kinds = [name for *_, name in spans if name in (PREFILL, DECODE)]
    ends = [end for _, end, name in spans if name == SAMPLE]
    steps = [
        (before, end)
        for (before, end), (last, kind) in zip(pairwise(ends), pairwise(kinds), strict=False)
        if last == kind == DECODE
    ]
    by_name: dict[str, tuple[int, float]] = {}
    reached = overlapped = 0.0
    for event in sorted((e for e in events if e["cat"] in _DEVICE_WORK), key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        own = max(0.0, end - max(event["ts"], reached))
        reached = max(reached, end)
        if any(begin <= event["ts"] < end for begin, end in steps):
            count, seconds = by_name.get(event["name"], (0, 0.0))
            by_name[event["name"]] = (count + 1, seconds + own / 1e6)
            overlapped += (event["dur"] - own) / 1e6
    return DeviceWork(len(steps), sum(end - begin for begin, end in steps) / 1e6, by_name, overlapped)
