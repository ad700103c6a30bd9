"""Measures a model that generates: what `shardwise bench generate` runs on every rank.

Random prompts, no end of text, greedy. After a warm-up of the same sizes come the timed runs, which nobody watches;
then one run under a clock for the parts of a step, and a short one under the profiler where there are kernels to name
or a trace was asked for.
"""

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.launch.machine import machine_facts
from shardwise.launch.model_config import ModelConfig
from shardwise.launch.session import Session
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.trace import Watcher, watched_by
from shardwise.sharding.spec import Moe

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.launch.worker import RankContext
    from shardwise.sharding.model import ModelSpec

MEASURE = "shardwise.launch.generation:measure"
"""The job target."""
COLLECTIVE_KERNELS = ("nccl", "one_shot", "two_shot", "allreduce", "all_reduce")
"""What names of kernels that move bytes between ranks contain: NCCL's, ours and FlashInfer's."""
TOP_KERNELS = 16
PROFILED_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is generated."""

    batch: int
    input: int
    """Tokens of every prompt."""
    output: int
    """New tokens of every prompt."""
    runs: int = 3
    seed: int = 0

    def prompts(self, vocab: int) -> list[list[int]]:
        """The same on every rank."""
        drawn = random.Random(self.seed)
        return [[drawn.randrange(vocab) for _ in range(self.input)] for _ in range(self.batch)]


@dataclass(frozen=True, slots=True)
class Run:
    """When the tokens of one call came."""

    arrivals: tuple[tuple[float, ...], ...]
    """For each request, seconds from the beginning of the call to each of its tokens"""

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.arrivals)

    @property
    def first_tokens(self) -> list[float]:
        return [times[0] for times in self.arrivals]

    @property
    def tokens_per_second(self) -> float:
        """End to end: all new tokens over the whole call."""
        return sum(map(len, self.arrivals)) / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Once every request has its first token; nan where none gets a second one."""
        begin = max(self.first_tokens)
        later = sum(at > begin for times in self.arrivals for at in times)
        return later / (self.seconds - begin) if later else float("nan")

    @property
    def intervals(self) -> list[float]:
        """Between consecutive tokens of a request, over all requests."""
        return [after - before for times in self.arrivals for before, after in pairwise(times)]


def measure(context: "RankContext") -> dict[str, Any]:
    """This rank's results, JSON values."""
    session = Session(context, ModelConfig(**context.payload["model"]))
    result = measure_session(session, Load(**context.payload["load"]), context.payload["trace"])
    with context.phase("stop"):
        session.close()
    return result


def measure_session(session: Session, load: Load, trace: str | None) -> dict[str, Any]:
    from shardwise.parallel.traffic import copy_bandwidth, step_bytes

    engine, context = session.engine, session.context
    gc.freeze()  # as `session.serve` does; what a clock keeps of each step makes collections more frequent
    with context.phase("run"):
        _tell(session, "measuring the copy bandwidth")
        engine.groups.world.barrier()
        bandwidth = copy_bandwidth(engine.device)
        _tell(session, "warming up")
        _generate(session, load)
        _tell(session, f"{load.runs} timed runs")
        runs = [_generate(session, load) for _ in range(load.runs)]
        _tell(session, "one run with every step timed")
        touched, parts = _touched(session, load), _clocked(session, load)
        device_step = _profiled(session, load, trace)
    read = step_bytes(
        engine.decoder,
        engine.plan,
        context.info.rank,
        batch=load.batch,
        context=load.input + load.output // 2,
        cache_itemsize=engine.dtype.itemsize,
    )
    return {
        "rank": context.info.rank,
        "runs": [_row(run) for run in runs],
        "step_parts": parts,
        "copy_bytes_per_second": bandwidth,
        "step_bytes": {**asdict(read), "total": read.total},
        "touched_seen": touched,
        "device_step": device_step,
        "stats": asdict(session.stats()),
        "device": session.device,
        "transport": session.transport,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "machine": machine_facts(),
    }


def _tell(session: Session, stage: str) -> None:
    if session.context.info.rank == 0:
        session.context.emit("stage", stage=stage)


def _generate(session: Session, load: Load, output: int | None = None) -> Run:
    engine = session.engine
    prompts = load.prompts(engine.plan.model.vocab)
    params = SamplingParams(max_new_tokens=output or load.output, ignore_eos=True)
    arrivals: list[list[float]] = [[] for _ in prompts]
    engine.groups.world.barrier()
    begin = time.perf_counter()
    for event in engine.stream(prompts, params):
        arrivals[event.request].append(time.perf_counter() - begin)
    return Run(tuple(map(tuple, arrivals)))


def _row(run: Run) -> dict[str, Any]:
    return {
        "tokens_per_second": run.tokens_per_second,
        "decode_tokens_per_second": run.decode_tokens_per_second,
        "first_token_seconds": _percentiles(run.first_tokens),
        "between_tokens_seconds": _percentiles(run.intervals),
        "seconds": run.seconds,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in _SHARES}
    return {"mean": statistics.fmean(ordered), **at, "max": ordered[-1]}


_SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def _touched(session: Session, load: Load) -> float | None:
    """The share of all experts that a step's tokens choose, measured in the prompts; None where no router was seen."""
    watcher = _Chosen(session.engine.plan.model, load.batch)
    with watched_by(watcher):
        _generate(session, load, output=1)
    return watcher.share


def _clocked(session: Session, load: Load) -> dict[str, Any]:
    """Mean times of each kind of step."""
    from shardwise.parallel.clock import Clock, mean

    clock = Clock(session.engine.device, session.context.info.rank)
    with watched_by(clock):
        _generate(session, load)
    return {
        kind: {
            "steps": len(steps),
            "seconds": {**asdict(typical), "other": typical.other},
            "longest_seconds": max(step.wall for step in steps),
        }
        for kind, steps in clock.steps().items()
        if (typical := mean(steps))
    }


def _profiled(session: Session, load: Load, trace: str | None) -> dict[str, Any] | None:
    """What a GPU does in a decode step, kernel by kernel, longest first; None on the CPU."""
    from shardwise.parallel.chrome_trace import ChromeTrace, decode_work

    on_gpu = session.engine.device.type == "cuda"
    if trace is None and not on_gpu:
        return None
    _tell(session, "one run under the profiler")
    with tempfile.TemporaryDirectory(prefix="shardwise-") as temporary:
        rank = session.context.info.rank
        written = ChromeTrace(Path(trace or temporary), rank, session.device, session.engine.device)
        with watched_by(written):
            _generate(session, load, output=min(load.output, PROFILED_TOKENS))
        written.close()
        work = decode_work(written.path)
    if not on_gpu or not work.steps:
        return None
    count, kernels = work.steps, sorted(work.by_name.items(), key=lambda item: -item[1][1])
    moving = [spent for name, (_, spent) in kernels if any(part in name.lower() for part in COLLECTIVE_KERNELS)]
    return {
        "steps": count,
        "seconds": work.seconds / count,
        "busy_seconds": sum(spent for _, (_, spent) in kernels) / count,
        "overlapped_seconds": work.overlapped / count,
        "collective_seconds": sum(moving) / count,
        "kernels": [
            {"name": name[:160], "calls": calls / count, "seconds": spent / count}
            for name, (calls, spent) in kernels[:TOP_KERNELS]
        ],
    }


class _Chosen(Watcher):
    """Which share of a layer's experts `batch` tokens choose together, from tokens spread over the prompts."""

    def __init__(self, model: "ModelSpec", batch: int):
        blocks = [block for layer in model.layers for block in layer.feed_forward if isinstance(block, Moe)]
        self._experts = blocks[0].expert_axis.units if blocks else 0
        self._batch = batch
        self._shares: list[float] = []

    def routed(self, ids: "Tensor") -> None:
        if len(ids) >= self._batch:
            chosen = ids[:: len(ids) // self._batch][: self._batch]
            self._shares.append(chosen.unique().numel() / self._experts)

    @property
    def share(self) -> float | None:
        return statistics.fmean(self._shares) if self._shares else None
