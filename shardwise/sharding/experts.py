"""Which rank holds which expert: contiguous by default, with copies of busy experts where asked for."""

from pathlib import Path

from shardwise.partition import extent, lengths
from shardwise.sharding.axes import LogicalAxis
from shardwise.sharding.config import ConfigError, read_json

Placement = tuple[tuple[int, ...], ...]
"""Experts of each moe_ep coordinate in slot order; every expert at least once, none twice on a rank."""


def place_experts(
    axis: LogicalAxis, ranks: int, redundant: int = 0, load: tuple[float, ...] | None = None
) -> Placement:
    """Experts of `ranks` expert-parallel ranks, `redundant` of them twice or more.

    Without `load` experts lie contiguously, remainder to the first ranks, and every rank is filled up with the experts
    that have the fewest copies, the first of them first. With `load` (one number an expert: tokens, or any share) the
    copies go to the experts with the most load a copy, and each goes to the rank with the least load so far.
    ValueError for counts that do not fit.
    """
    experts = axis.units
    if redundant < 0 or redundant > experts * (ranks - 1):
        raise ValueError(
            f"{redundant} redundant experts: each of {experts} experts fits once on each of {ranks} ranks, so at most "
            f"{experts * (ranks - 1)} copies"
        )
    if load is not None and len(load) != experts:
        raise ValueError(f"the load file has {len(load)} numbers, the model has {experts} experts")
    if load is None:
        return _round_robin(experts, ranks, redundant)
    return _by_load(experts, ranks, redundant, load)


def check_placement(placement: Placement, axis: LogicalAxis, ranks: int, *, stacked: bool) -> None:
    """ValueError for a placement that does not fit `ranks` expert-parallel ranks.

    `stacked`: the checkpoint has experts in one tensor, of which a rank reads its own in ascending order.
    """
    if len(placement) != ranks:
        raise ValueError(f"experts are placed on {len(placement)} ranks, ep is {ranks}: give the experts of each")
    for rank, held in enumerate(placement):
        unknown = [expert for expert in held if expert not in range(axis.units)]
        if unknown:
            raise ValueError(f"expert {unknown[0]} is placed on ep rank {rank}, the model has {axis.units} experts")
        if not held or len(set(held)) < len(held):
            raise ValueError(f"ep rank {rank} gets experts {held}: give it at least one, and each once")
        if stacked and list(held) != sorted(held):
            raise ValueError(f"ep rank {rank} gets experts {held}: give them ascending, they are parts of one tensor")
    missing = set(range(axis.units)).difference(*placement)
    if missing:
        raise ValueError(f"expert {min(missing)} is placed on no rank: each of {axis.units} experts needs one")


def read_load(path: str | Path) -> tuple[float, ...]:
    """A JSON list of one non-negative number an expert."""
    data = read_json(path, list, "a list of non-negative numbers, one an expert")
    if not all(type(x) in (int, float) and x >= 0 for x in data):
        raise ConfigError(f"{path}: expected a list of non-negative numbers, one an expert")
    return tuple(float(x) for x in data)


def _round_robin(experts: int, ranks: int, redundant: int) -> Placement:
    held = [set(range(*extent(experts, ranks, i))) for i in range(ranks)]
    copies = [1] * experts
    quota = lengths(experts + redundant, ranks)
    for rank, mine in enumerate(held):
        while len(mine) < quota[rank]:
            expert = min((e for e in range(experts) if e not in mine), key=lambda e: (copies[e], e))
            mine.add(expert)
            copies[expert] += 1
    return tuple(tuple(sorted(h)) for h in held)


def _by_load(experts: int, ranks: int, redundant: int, load: tuple[float, ...]) -> Placement:
    copies = [1] * experts
    for _ in range(redundant):
        busiest = max((e for e in range(experts) if copies[e] < ranks), key=lambda e: (load[e] / copies[e], -e))
        copies[busiest] += 1
    room = list(lengths(experts + redundant, ranks))
    held: list[set[int]] = [set() for _ in range(ranks)]
    carried = [0.0] * ranks
    # Experts with most copies first: they need the most different ranks, and room for them must not run out.
    order = sorted(range(experts), key=lambda e: (-copies[e], -load[e] / copies[e], e))
    for expert in order:
        for _ in range(copies[expert]):
            free = [i for i in range(ranks) if room[i] and expert not in held[i]]
            if not free:
                _swap_in(expert, held, room)
                continue
            target = min(free, key=lambda i: (carried[i], i))
            held[target].add(expert)
            room[target] -= 1
            carried[target] += load[expert] / copies[expert]
    return tuple(tuple(sorted(h)) for h in held)


def _swap_in(expert: int, held: list[set[int]], room: list[int]) -> None:
    """Only ranks that hold the expert have room: move one of another rank's experts there and take its place."""
    target = next(i for i, r in enumerate(room) if r)
    for experts in held:
        movable = sorted(experts - held[target])
        if expert not in experts and movable:
            experts.remove(movable[0])
            experts.add(expert)
            held[target].add(movable[0])
            room[target] -= 1
            return
    raise AssertionError("no placement although the counts fit")
