"""Logical axes, and dimensions as concatenations of segments.

*axis* is a logical axis of the model, *mesh axis* an axis of the rank grid, *dim* a dimension of a tensor. A dim is a
concatenation of segments; each segment counts units of one axis, so a fused `qkv` is
`[q_heads * head_dim | kv_heads * head_dim | kv_heads * head_dim]` and a per-group interleaved one lists its groups one
after another. A rank's share of an axis (`cuts.py`) turns into index ranges of a dim here, and nowhere else.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

Range = tuple[int, int]


class MeshAxis(StrEnum):
    TP = "tp"
    ATTN_DP = "attn_dp"
    MOE_TP = "moe_tp"
    MOE_EP = "moe_ep"

    @property
    def option(self) -> str:
        """As the command line, and so a sentence, calls its size."""
        return "ep" if self is MeshAxis.MOE_EP else self.value


CUTTING = (MeshAxis.TP, MeshAxis.MOE_TP, MeshAxis.MOE_EP)
"""Mesh axes that cut something; attn_dp only copies."""


class Axis(StrEnum):
    """Axes that can be cut. Hidden, head_dim and latent dims are never cut and carry no axis."""

    VOCAB = "vocab"
    Q_HEADS = "q_heads"
    KV_HEADS = "kv_heads"
    O_GROUPS = "o_groups"
    MLP = "mlp"
    EXPERTS = "experts"
    EXPERT_MLP = "expert_mlp"
    SSM_HEADS = "ssm_heads"
    SSM_GROUPS = "ssm_groups"
    DELTA_K_HEADS = "delta_k_heads"
    DELTA_V_HEADS = "delta_v_heads"


MESH_AXIS = {axis: MeshAxis.TP for axis in Axis} | {
    Axis.EXPERTS: MeshAxis.MOE_EP,
    Axis.EXPERT_MLP: MeshAxis.MOE_TP,
}
"""The mesh axis that cuts each logical axis."""

SHARED_BY_RANKS = frozenset({Axis.KV_HEADS, Axis.SSM_GROUPS, Axis.DELTA_K_HEADS})
"""Axes whose units are replicated when there are more ranks than units."""


@dataclass(frozen=True, slots=True)
class LogicalAxis:
    """One axis of one block: its length, and the groups that its units belong to (query heads to KV heads, ...)."""

    axis: Axis
    units: int
    groups: int = 0
    """0: units stand alone; else `units / groups` consecutive units share a group and are cut along with it."""

    def __post_init__(self):
        if self.units < 1:
            raise ValueError(f"axis {self.axis}: {self.units} units, need at least 1")
        if self.groups and self.units % self.groups:
            raise ValueError(
                f"{self.units} {self.axis} in {self.groups} groups: {self.units} % {self.groups} = "
                f"{self.units % self.groups}, need 0"
            )

    @property
    def per_group(self) -> int:
        return self.units // self.groups if self.groups else 1


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of an axis: unit ranges, ascending, and the local length, which padding may enlarge."""

    ranges: tuple[Range, ...]
    length: int

    @property
    def padding(self) -> int:
        return self.length - span(self.ranges)


@dataclass(frozen=True, slots=True)
class Segment:
    """`units * size` consecutive elements: units `[start, start + units)` of an axis, or uncut where axis is None."""

    units: int
    size: int = 1
    axis: LogicalAxis | None = None
    start: int = 0

    @property
    def length(self) -> int:
        return self.units * self.size

    def local(self, share: Share | None) -> tuple[list[Range], int]:
        """Element ranges inside the segment that belong to `share`, and elements of padding after them."""
        if self.axis is None or share is None:
            return [(0, self.length)], 0
        stop = self.start + self.units
        ranges = [
            ((max(a, self.start) - self.start) * self.size, (min(b, stop) - self.start) * self.size)
            for a, b in share.ranges
            if a < stop and b > self.start
        ]
        at_end = stop == self.axis.units
        return ranges, share.padding * self.size if at_end else 0


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a stored tensor: segments in order, `per` of whose elements one stored element stands for."""

    segments: tuple[Segment, ...]
    per: int = 1

    @property
    def length(self) -> int:
        return -(-sum(s.length for s in self.segments) // self.per)

    @property
    def axes(self) -> tuple[LogicalAxis, ...]:
        """Distinct axes that cut this dim, in segment order."""
        return tuple(dict.fromkeys(s.axis for s in self.segments if s.axis is not None))

    def coarse(self, per: int) -> "Dim":
        """The same dim where one stored element stands for `per` elements: packed words, blocks, scale groups."""
        return Dim(self.segments, self.per * per) if per > 1 else self

    def local(self, share_of: Callable[[LogicalAxis], Share | None]) -> tuple[tuple[Range, ...], int]:
        """A rank's index ranges of this dim, ascending and disjoint, and its local length with padding.

        With `per > 1` the ranges are those of the enclosing stored elements.
        """
        ranges: list[Range] = []
        padding = offset = 0
        for segment in self.segments:
            inside, pad = segment.local(share_of(segment.axis) if segment.axis else None)
            ranges += [(offset + a, offset + b) for a, b in inside]
            padding += pad
            offset += segment.length
        merged = merge((a // self.per, -(-b // self.per)) for a, b in ranges)
        return merged, span(merged) + -(-padding // self.per)

    def parts(self, share_of: Callable[[LogicalAxis], Share | None]) -> tuple[tuple[int, int], ...]:
        """(elements, padding behind them) of a rank's part of each segment, in a dim with `per == 1`."""
        local = [segment.local(share_of(segment.axis) if segment.axis else None) for segment in self.segments]
        return tuple((span(inside), padding) for inside, padding in local)


def fixed(length: int) -> Dim:
    """A dim that is never cut."""
    return Dim((Segment(length),))


def along(axis: LogicalAxis, size: int = 1) -> Dim:
    """A dim of all units of one axis, `size` elements each."""
    return Dim((Segment(axis.units, size, axis),))


def concat(*dims: Dim) -> Dim:
    """The dims concatenated, as in a fused projection."""
    return Dim(tuple(s for dim in dims for s in dim.segments))


def interleave(*parts: tuple[LogicalAxis, int]) -> Dim:
    """Groups one after another, each with its own units of every axis in turn: `[q.. k v | q.. k v | ...]`.

    `parts` are (axis, elements a unit); all axes have the same number of groups.
    """
    groups = parts[0][0].groups
    return Dim(
        tuple(
            Segment(axis.per_group, size, axis, group * axis.per_group)
            for group in range(groups)
            for axis, size in parts
        )
    )


def span(ranges: Iterable[Range]) -> int:
    return sum(b - a for a, b in ranges)


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sorted, disjoint, with touching ranges joined and empty ones dropped."""
    out: list[Range] = []
    for a, b in sorted(ranges):
        if a >= b:
            continue
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return tuple(out)
