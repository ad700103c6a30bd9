"""The legal sizes of every mesh axis for a model, and what stops the others."""

from dataclasses import dataclass

from shardwise.sharding.axes import CUTTING, MESH_AXIS, SHARED_BY_RANKS, LogicalAxis, MeshAxis
from shardwise.sharding.cuts import Cut, CutKind
from shardwise.sharding.cutting import Grain, axes_of, grain_of, grains_of, largest, user_of
from shardwise.sharding.layout import MOST_RANKS
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.shards import patterns_of
from shardwise.sharding.tensors import TensorSpec

SHOWN = 24
"""Sizes of a list that the text names, before its last."""


@dataclass(frozen=True, slots=True)
class LegalSizes:
    """Sizes of one mesh axis: all of `1 .. most` are legal, `even` ones give every rank the same."""

    mesh: MeshAxis
    most: int
    even: tuple[int, ...]
    stopped_by: str
    """The tensor and axis that do not fit on more ranks; or that no plan has more."""
    uneven: tuple[tuple[str, tuple[int, ...]], ...]
    """What is uneven, with the sizes up to `most` where it is even."""


def legal_sizes(model: ModelSpec) -> tuple[LegalSizes, ...]:
    """For tp, and for moe_tp and moe_ep where the model has experts. attn_dp is free: it only copies."""
    tensors = tuple(p.spec for p in patterns_of(model) if p.loaded)
    grains = grains_of(tensors)
    sizes = []
    for mesh in CUTTING:
        axes = [(axis, grain_of(axis, grains)) for axis in axes_of(tensors) if MESH_AXIS[axis.axis] is mesh]
        if axes:
            sizes.append(_sizes(mesh, axes, tensors))
    return tuple(sizes)


def _sizes(mesh: MeshAxis, axes: list[tuple[LogicalAxis, Grain]], tensors: tuple[TensorSpec, ...]) -> LegalSizes:
    limit, (axis, grain) = min(((largest(a, g), (a, g)) for a, g in axes), key=lambda row: row[0])
    bound, limit = limit > MOST_RANKS, min(limit, MOST_RANKS)
    blocks = f" in blocks of {grain.units}" if grain.units > 1 and not axis.groups else ""
    even_of = {a: tuple(n for n in range(1, limit + 1) if _even(a, g, n)) for a, g in axes}
    even = sorted(set(range(1, limit + 1)).intersection(*even_of.values()))
    uneven = {f"{a.units} {a.axis}": sizes for a, sizes in even_of.items() if len(sizes) < limit and _binds(a)}
    stopped = f"{user_of(axis, tensors).name}: {axis.units} {axis.axis}{blocks}"
    stopped = "the most ranks of a plan" if bound else stopped
    return LegalSizes(mesh, limit, tuple(even), stopped, tuple(uneven.items()))


def _binds(axis: LogicalAxis) -> bool:
    """KV heads and their like follow the axis that is cut with them."""
    return axis.axis not in SHARED_BY_RANKS


def _even(axis: LogicalAxis, grain: Grain, parts: int) -> bool:
    items = axis.groups or axis.units
    units = 1 if axis.groups and -(-items // grain.units) < parts else grain.units
    return Cut(axis, parts, units).kind in (CutKind.WHOLE, CutKind.EVEN, CutKind.REPLICATE)


def legal_text(sizes: tuple[LegalSizes, ...]) -> str:
    """One paragraph a mesh axis."""
    lines = []
    for row in sizes:
        lines.append(f"{row.mesh.option}: 1 to {row.most}; even: {_list(row.even)}")
        lines.append(f"  stopped at {row.most} by {row.stopped_by}")
        lines += [f"  {what}: even on {_list(even)}" for what, even in row.uneven]
    lines.append("attn_dp: any; tp * attn_dp = moe_tp * ep must hold, and ranks of one attn_dp group share a batch")
    return "\n".join(lines)


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (f", ... {numbers[-1]}" if len(numbers) > SHOWN else "")
