"""Which cut every axis of a model gets under a layout, and why a layout is refused.

The cut unit of an axis is the least common multiple over all tensors on it of what their storage binds together:
quantisation blocks, scale groups, packed words. Whole heads that such a unit does not divide share a scale block.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import NamedTuple

from shardwise.sharding.axes import MESH_AXIS, SHARED_BY_RANKS, Axis, LogicalAxis, MeshAxis
from shardwise.sharding.checkpoint.header import STORAGE
from shardwise.sharding.cuts import Cut, CutKind, IllegalCut
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.tensors import TensorSpec

_PARTNERS = {
    Axis.KV_HEADS: Axis.Q_HEADS,
    Axis.O_GROUPS: Axis.Q_HEADS,
    Axis.SSM_GROUPS: Axis.SSM_HEADS,
    Axis.DELTA_K_HEADS: Axis.DELTA_V_HEADS,
}
"""Axes that are split group by group together with another one and so need the same cut unit."""


NO_BOUND = 1 << 30
NOTABLE_IMBALANCE = 1e-3
MORE = 2
"""How many times the ranks asked for a larger number may be to be named beside smaller ones."""
PADDABLE = (Axis.VOCAB, Axis.MLP, Axis.EXPERT_MLP)


class IllegalLayout(ValueError):
    """The model cannot be cut this way; `reasons` has one sentence for each axis that does not fit. `exit_code` is the
    job's."""

    exit_code = 2

    def __init__(self, text: str, reasons: tuple[str, ...]):
        super().__init__(text)
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Grain:
    """The cut unit of an axis (of a group, where the axis is grouped) and the tensor that asks for it."""

    units: int = 1
    because: str = ""


class _Choice(NamedTuple):
    """What an axis gets on one number of ranks: a cut with its warnings, or the reason why there is none."""

    cut: Cut | None
    warnings: tuple[str, ...] = ()
    illegal: str = ""


class Cutting:
    """The cuts of some tensors under any layout. `pad`: axes whose ranks get equal lengths by padding."""

    def __init__(self, tensors: Iterable[TensorSpec], pad: Iterable[Axis] = ()):
        self._tensors = tuple(tensors)
        self._grains = grains_of(self._tensors)
        self._padded = {_family(axis) for axis in pad}
        self._choices: dict[tuple[LogicalAxis, int], _Choice] = {}
        self.axes = axes_of(self._tensors)

    def under(self, layout: ParallelLayout) -> tuple[dict[LogicalAxis, Cut], tuple[str, ...]]:
        """A cut for every axis, and warnings. IllegalLayout lists every axis that cannot be cut."""
        choices = {axis: self._choice(axis, getattr(layout, MESH_AXIS[axis.axis])) for axis in self.axes}
        reasons = tuple(
            _reason(axis, layout, choice.illegal, grain_of(axis, self._grains), self._tensors)
            for axis, choice in choices.items()
            if choice.cut is None
        )
        if reasons:
            raise IllegalLayout(f"{layout} does not fit: " + "; ".join(reasons), reasons)
        warnings = dict.fromkeys(text for choice in choices.values() for text in choice.warnings)
        return {axis: choice.cut for axis, choice in choices.items() if choice.cut}, tuple(warnings)

    def _choice(self, axis: LogicalAxis, parts: int) -> _Choice:
        if (axis, parts) not in self._choices:
            grain, pad = grain_of(axis, self._grains), _family(axis.axis) in self._padded
            try:
                choice = _Choice(*_cut(axis, parts, grain, pad))
            except IllegalCut as error:
                choice = _Choice(None, illegal=str(error))
            self._choices[axis, parts] = choice
        return self._choices[axis, parts]


def axes_of(tensors: Iterable[TensorSpec]) -> tuple[LogicalAxis, ...]:
    """Distinct axes in order of first use."""
    seen: dict[LogicalAxis, None] = {}
    for tensor in tensors:
        if tensor.experts:
            seen.setdefault(tensor.experts)
        for dim in tensor.dims:
            seen.update(dict.fromkeys(dim.axes))
    return tuple(seen)


def grains_of(tensors: Iterable[TensorSpec]) -> Mapping[object, Grain]:
    """The cut unit of every axis, by `_key`: units that stand alone, or groups."""
    grains: dict[object, Grain] = {}
    for tensor in tensors:
        if tensor.experts:
            grains.setdefault(_key(tensor.experts), Grain())
        for position, dim in enumerate(tensor.dims):
            block = dim.per
            if position == len(tensor.dims) - 1:
                block *= STORAGE[tensor.dtype][0]
            for segment in dim.segments:
                if segment.axis is None:
                    continue
                size = segment.size * segment.axis.per_group
                unit = block // gcd(block, size)
                old = grains.setdefault(_key(segment.axis), Grain())
                if old.units % unit:
                    grains[_key(segment.axis)] = Grain(lcm(old.units, unit), tensor.name)
    return grains


def grain_of(axis: LogicalAxis, grains: Mapping[object, Grain]) -> Grain:
    """The cut unit of `axis` among those of `grains_of`."""
    return grains[_key(axis)]


def user_of(axis: LogicalAxis, tensors: Iterable[TensorSpec]) -> TensorSpec:
    """The first tensor that the axis cuts, to name in a message."""
    return next(t for t in tensors if t.experts == axis or any(axis in d.axes for d in t.dims))


def _key(axis: LogicalAxis) -> object:
    return (_family(axis.axis), axis.groups or axis.units)


def _family(axis: Axis) -> Axis:
    """The axis that leads: KV heads go where their query heads go."""
    return _PARTNERS.get(axis, axis)


def _cut(axis: LogicalAxis, parts: int, grain: Grain, pad: bool) -> tuple[Cut, tuple[str, ...]]:
    """The cut and its warnings."""
    warnings = []
    items = axis.groups or axis.units
    shares_blocks = (
        grain.units > 1 and axis.axis not in (Axis.MLP, Axis.EXPERT_MLP) and -(-items // grain.units) < parts
    )
    if shares_blocks:
        warnings.append(
            f"{grain.because}: {grain.units} {axis.axis} share a quantisation block, {items} on {parts} ranks cannot "
            "keep blocks whole: neighbouring ranks both hold the block at the cut"
        )
    cut = Cut(axis, parts, 1 if shares_blocks else grain.units, pad and (not axis.groups or parts <= axis.groups))
    text = _imbalance(cut) if cut.kind is CutKind.UNEVEN else ""
    warnings += [text] if text else []
    return cut, tuple(warnings)


def _imbalance(cut: Cut) -> str:
    """What the uneven cut costs and how to avoid it; nothing below a thousandth."""
    lengths = [cut.share(i).length for i in range(cut.parts)]
    excess = max(lengths) * cut.parts / sum(lengths) - 1
    if excess < NOTABLE_IMBALANCE:
        return ""
    unit = f" in blocks of {cut.grain}" if cut.grain > 1 else ""
    axis = cut.axis.axis
    ways = [f"even on {', '.join(map(str, _even_sizes(cut)))}"]
    ways += [f"--pad {axis}"] if axis in PADDABLE else []
    ways += ["expert parallel (--ep)"] if axis is Axis.EXPERT_MLP else []
    return (
        f"{cut.axis.units} {axis} on {cut.parts} ranks are uneven{unit}: {max(lengths)} to {min(lengths)}, "
        f"the fullest rank holds {excess:.1%} more than an even share ({', or '.join(ways)})"
    )


def _even_sizes(cut: Cut) -> list[int]:
    """Numbers of ranks that would hold the same: all below the cut's, and the next above."""
    units = cut.axis.groups or cut.axis.units
    items = units // cut.grain
    if items * cut.grain != units:
        return [1]
    even = [n for n in range(1, min(items, MORE * cut.parts) + 1) if items % n == 0]
    return [n for n in even if n < cut.parts] + [n for n in even if n > cut.parts][:1]


def _reason(axis: LogicalAxis, layout: ParallelLayout, why: str, grain: Grain, tensors: tuple[TensorSpec, ...]) -> str:
    mesh = MESH_AXIS[axis.axis]
    because = f" ({grain.because} is stored in such blocks)" if grain.units > 1 else ""
    user = user_of(axis, tensors)
    return f"{user.name}: {why}{because}; {', or '.join(_offers(axis, mesh, grain, layout, user))}"


def _offers(axis: LogicalAxis, mesh: MeshAxis, grain: Grain, layout: ParallelLayout, user: TensorSpec) -> list[str]:
    most = largest(axis, grain)
    offers = [f"smaller {mesh.option} (at most {most})"]
    if axis.axis in PADDABLE:
        offers.append(f"--pad {axis.axis}")
    if axis.axis is Axis.EXPERT_MLP and most * (ep := _most_expert_parallel(user, layout.world)) >= layout.world:
        offers.append(f"expert parallel instead (--ep {ep})")
    if mesh is MeshAxis.TP:
        offers.append("attention data parallel for the rest (--attn-dp)")
    return offers


def _most_expert_parallel(user: TensorSpec, world: int) -> int:
    """The largest ep of this world under which every rank has an expert."""
    experts = sum(axis.units for axis in axes_of([user]) if axis.axis is Axis.EXPERTS)
    return max(ep for ep in range(1, min(experts, world) + 1) if world % ep == 0)


def largest(axis: LogicalAxis, grain: Grain) -> int:
    """The most ranks that the axis can be split over; no bound for axes that ranks can share."""
    if axis.axis in SHARED_BY_RANKS:
        return NO_BOUND
    return axis.units if axis.groups else -(-axis.units // grain.units)
