"""How much of a workload fits a plan, and what would fit a workload that does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from shardwise.sharding.cost import Workload, memory_of
from shardwise.sharding.plan import Plan
from shardwise.sharding.search import MOST_DEVICES, Objective, search
from shardwise.sharding.topology import Topology

MOST = 1 << 40
"""Sequences or tokens at which looking ends: a model without a cache takes any number."""
GROWTH = (1, 2, 4, 8)
"""Times as many devices as the plan has are looked at for a layout that fits."""


def most_sequences(plan: Plan, topology: Topology, workload: Workload) -> int:
    """The largest batch of sequences of the workload's lengths that fits the fullest rank, 0 for none."""
    return _most(plan, topology, lambda n: replace(workload, batch=n))


def most_context(plan: Plan, topology: Topology, workload: Workload) -> int:
    """The longest context at the workload's batch, 0 where not even the prompts fit."""
    return _most(plan, topology, lambda n: replace(workload, context=n))


def _most(plan: Plan, topology: Topology, of: Callable[[int], Workload]) -> int:
    rank = plan.fullest_rank

    def fits(n: int) -> bool:
        return memory_of(plan, topology, of(n), rank).fits

    below, above = 0, 1
    while above < MOST and fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def devices_tried(world: int) -> tuple[int, ...]:
    """Numbers of devices that `remedies` looks at for a plan of so many ranks; none for a plan of too many."""
    return tuple(world * times for times in GROWTH if world * times <= MOST_DEVICES)


def remedies(plan: Plan, topology: Topology, workload: Workload) -> Iterator[str]:
    """What fits instead of a plan that does not: fewer sequences, a shorter context, another layout, more devices."""
    sequences = most_sequences(plan, topology, workload)
    if sequences:
        yield f"--batch {sequences}"
    context = most_context(plan, topology, workload)
    if context >= workload.prompt:
        yield f"--context {context}"
    seen = 0
    for devices in devices_tried(plan.layout.world):
        found = search(
            plan.model,
            topology.spread(devices, None),
            workload,
            devices=devices,
            objective=Objective.LATENCY,
            kv_itemsize=plan.kv_itemsize,
            above=seen,
        )
        if found.fits:
            yield f"{found.ranked[0].layout} (--search --gpus {devices} ranks all)"
            return
        seen = devices
