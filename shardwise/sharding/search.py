"""Every layout of a model on a number of devices: ranked where legal, with the reason where not."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from shardwise.sharding.cost import Estimate, Workload, estimate
from shardwise.sharding.cutting import IllegalLayout
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.plan import Plan, Planner
from shardwise.sharding.topology import Topology

MOST_DEVICES = 4096
"""Layouts of a model with experts are 819 on 4096 and 10,780 on 3600, priced in 0.2 s and 2.3 s of one CPU core."""


class Objective(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal layout and what it costs."""

    plan: Plan
    estimate: Estimate
    replicas: int
    """Copies of the model that the devices hold side by side."""

    @property
    def layout(self) -> ParallelLayout:
        return self.plan.layout

    @property
    def tokens_per_second(self) -> float:
        """Decoding, over all replicas, each at the workload's batch."""
        return self.replicas * self.estimate.decode_tokens_per_second


@dataclass(frozen=True, slots=True)
class Refusal:
    layout: ParallelLayout
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SearchResult:
    model: ModelSpec
    topology: Topology
    workload: Workload
    devices: int
    objective: Objective
    ranked: tuple[Candidate, ...]
    """Those that fit, best first; then those that do not, by bytes missing."""
    refused: tuple[Refusal, ...]

    @property
    def fits(self) -> bool:
        return bool(self.ranked) and self.ranked[0].estimate.memory.fits


def search(
    model: ModelSpec,
    topology: Topology,
    workload: Workload,
    *,
    devices: int,
    objective: Objective,
    kv_itemsize: int = 2,
    above: int = 0,
) -> SearchResult:
    """All layouts whose world divides `devices` and is larger than `above`; the rest of the devices hold replicas."""
    if devices > MOST_DEVICES:
        raise ValueError(
            f"{devices} devices are more than a search tries ({MOST_DEVICES}): search a part, the rest repeat it"
        )
    planner = Planner(model, kv_itemsize=kv_itemsize)
    found: list[Candidate] = []
    refused: list[Refusal] = []
    for layout in layouts(devices, model.has_experts):
        if layout.world <= above:
            continue
        try:
            planned = planner.plan(layout)
        except IllegalLayout as error:
            refused.append(Refusal(layout, error.reasons))
            continue
        found.append(Candidate(planned, estimate(planned, topology, workload), devices // layout.world))
    ranked = tuple(sorted(found, key=lambda c: _rank(c, objective)))
    return SearchResult(model, topology, workload, devices, objective, ranked, tuple(refused))


def layouts(devices: int, experts: bool) -> Iterator[ParallelLayout]:
    """Layouts with `tp * attn_dp = moe_tp * moe_ep` dividing `devices`; for a dense model replicas replace attn_dp."""
    for world in _divisors(devices):
        for tp in _divisors(world):
            if not experts:
                if tp == world:
                    yield ParallelLayout(tp)
                continue
            yield from (ParallelLayout(tp, world // tp, world // ep, ep) for ep in _divisors(world))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _rank(candidate: Candidate, objective: Objective) -> tuple:
    memory = candidate.estimate.memory
    figure = {
        Objective.LATENCY: candidate.estimate.decode.total,
        Objective.THROUGHPUT: -candidate.tokens_per_second,
        Objective.MEMORY: -memory.left,
    }[objective]
    return (not memory.fits, figure if memory.fits else -memory.left, candidate.layout.world)
