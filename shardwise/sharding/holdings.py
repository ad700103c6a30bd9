"""What ranks hold of the tensors that the same mesh axes cut: alike for ranks at one place on these axes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from shardwise.sharding.axes import MeshAxis
from shardwise.sharding.layout import Coordinates
from shardwise.sharding.shards import Cuts, TensorPattern, local_count, mesh_axes_of


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's part of a pattern."""

    pattern: TensorPattern
    local_shape: tuple[int, ...]
    nbytes: int
    """Of one of the `count` tensors that the rank holds."""
    count: int
    routed: bool
    """Of experts that tokens are routed to."""


class Amount(NamedTuple):
    """Sums over a rank's parts of patterns."""

    weight_bytes: int
    parameters: int
    tensors: int


@dataclass(frozen=True)
class Holdings:
    """The patterns that `axes` cut, and their parts. Layouts with the same sizes of these axes share one object."""

    axes: tuple[MeshAxis, ...]
    patterns: tuple[TensorPattern, ...]
    cuts: Cuts

    def at(self, at: Coordinates) -> tuple[Held, ...]:
        """What a rank at these coordinates holds of every pattern."""
        return self._at(at)[0]

    def amount(self, at: Coordinates) -> Amount:
        return self._at(at)[1]

    def _at(self, at: Coordinates) -> tuple[tuple[Held, ...], Amount]:
        place = tuple(getattr(at, axis) for axis in self.axes)
        if place not in self._known:
            held = tuple(self._held(pattern, at) for pattern in self.patterns)
            self._known[place] = held, total(map(_amount, held))
        return self._known[place]

    def _held(self, pattern: TensorPattern, at: Coordinates) -> Held:
        shard = self.cuts.shard(pattern.spec, at, pattern.spec.name)
        routed = MeshAxis.MOE_EP in self.axes
        return Held(pattern, shard.local_shape, shard.nbytes, local_count(pattern, self.cuts, at), routed)

    @cached_property
    def _known(self) -> dict[tuple[int, ...], tuple[tuple[Held, ...], Amount]]:
        return {}


def by_mesh_axes(patterns: Iterable[TensorPattern]) -> dict[tuple[MeshAxis, ...], tuple[TensorPattern, ...]]:
    """Patterns by the mesh axes that cut them."""
    groups: dict[tuple[MeshAxis, ...], list[TensorPattern]] = {}
    for pattern in patterns:
        groups.setdefault(mesh_axes_of(pattern.spec), []).append(pattern)
    return {axes: tuple(group) for axes, group in groups.items()}


def total(amounts: Iterable[Amount]) -> Amount:
    return Amount(*map(sum, zip(*amounts, strict=True)))


def _amount(held: Held) -> Amount:
    parameters = prod(held.local_shape) * held.pattern.spec.values * held.count
    return Amount(held.nbytes * held.count, parameters, held.count if all(held.local_shape) else 0)
