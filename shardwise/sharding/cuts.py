"""How one logical axis falls on the ranks of one mesh axis. All arithmetic is `shardwise.partition`."""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from shardwise.partition import extent, owner
from shardwise.sharding.axes import SHARED_BY_RANKS, LogicalAxis, Share, merge


class CutKind(StrEnum):
    WHOLE = "whole"
    EVEN = "even"
    UNEVEN = "uneven"
    PAD = "pad"
    REPLICATE = "replicate"


class IllegalCut(ValueError):
    """An axis cannot be cut this way; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Axis `axis` split over `parts` ranks in bundles of `grain` units (groups, where the axis is grouped).

    - fewer ranks than bundles: whole bundles, remainder to the first ranks (`even` or `uneven`; `pad` splits the length
      that is padded up to a multiple of `parts` bundles, so that every rank's local length is equal);
    - more ranks than groups of a grouped axis: ranks are assigned to groups by the same rule, the ranks of a group
      share its KV head (`replicate`) and split its query heads.

    IllegalCut when a rank would be left with nothing.
    """

    axis: LogicalAxis
    parts: int
    grain: int = 1
    padded: bool = False

    def __post_init__(self):
        if self.parts < 1 or self.grain < 1:
            raise ValueError(f"cut of {self.axis.axis}: parts {self.parts} and grain {self.grain} must be at least 1")
        reason = self._illegal()
        if reason:
            raise IllegalCut(reason)

    @property
    def kind(self) -> CutKind:
        if self.parts == 1:
            return CutKind.WHOLE
        if self._shares_groups:
            if self.axis.axis in SHARED_BY_RANKS:
                return CutKind.REPLICATE
            return CutKind.EVEN if self.axis.units % self.parts == 0 else CutKind.UNEVEN
        if self.padded and self._padded_items % (self.parts * self.grain) == 0 and self._padded_items > self._items:
            return CutKind.PAD
        return CutKind.EVEN if self._items % (self.parts * self.grain) == 0 else CutKind.UNEVEN

    @property
    def bundles(self) -> int:
        return -(-self._items // self.grain)

    def share(self, index: int) -> Share:
        """The share of part `index`. ValueError for an index outside of `[0, parts)`."""
        return _share(self, index)

    @property
    def _items(self) -> int:
        """What is split: groups where there are groups, else units."""
        return self.axis.groups or self.axis.units

    @property
    def _padded_items(self) -> int:
        if not self.padded:
            return self._items
        step = self.grain * self.parts
        return -(-self._items // step) * step

    @property
    def _shares_groups(self) -> bool:
        return 0 < self.axis.groups < self.parts and not self.padded

    def _illegal(self) -> str:
        axis, parts = self.axis, self.parts
        if self.padded or parts <= self.bundles:
            return ""
        if 0 < axis.groups < parts:
            sharing = -(-parts // axis.groups)
            if axis.axis in SHARED_BY_RANKS or sharing <= axis.per_group:
                return ""
            return (
                f"{axis.units} {axis.axis} in {axis.groups} groups on {parts} ranks: {sharing} ranks would share the "
                f"{axis.per_group} of one group"
            )
        if self.grain > 1:
            return (
                f"{self._items} {axis.axis} units are {self.bundles} blocks of {self.grain}, too few for {parts} ranks"
            )
        return f"{axis.units} {axis.axis} units, too few for {parts} ranks"


@lru_cache(maxsize=65536)
def _share(cut: Cut, index: int) -> Share:
    axis = cut.axis
    if cut._shares_groups:
        return _share_in_group(cut, index)
    size = axis.per_group
    start, stop = extent(-(-cut._padded_items // cut.grain), cut.parts, index)
    start, stop = start * cut.grain * size, stop * cut.grain * size
    length = stop - start if cut.padded else min(stop, axis.units) - start
    return Share(merge([(min(start, axis.units), min(stop, axis.units))]), length)


def _share_in_group(cut: Cut, index: int) -> Share:
    axis = cut.axis
    group = owner(cut.parts, axis.groups, index)
    first, last = extent(cut.parts, axis.groups, group)
    if axis.axis in SHARED_BY_RANKS:
        start, stop = 0, axis.per_group
    else:
        start, stop = extent(axis.per_group, last - first, index - first)
    base = group * axis.per_group
    return Share(((base + start, base + stop),), stop - start)
