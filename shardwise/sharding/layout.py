"""The rank grid: `tp * attn_dp = world = moe_tp * moe_ep`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple

MOST_RANKS = 1 << 17
"""That a plan is made for: more are a slip of the hand, and their totals would take minutes."""


class Coordinates(NamedTuple):
    """Where a rank stands on each mesh axis: tp is fastest inside attn_dp, moe_ep fastest inside moe_tp."""

    tp: int
    attn_dp: int
    moe_tp: int
    moe_ep: int


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the mesh axes. `moe_tp` left at 0 becomes `world / moe_ep`.

    Embedding, head, attention, dense MLP and shared experts are cut over tp (and replicated over attn_dp); routed
    experts are split over moe_ep and each is cut over moe_tp. ValueError names the equation that does not hold.
    """

    tp: int = 1
    attn_dp: int = 1
    moe_tp: int = 0
    moe_ep: int = 1

    def __post_init__(self):
        for name in ("tp", "attn_dp", "moe_tp", "moe_ep"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, expected an integer")
            if value < (0 if name == "moe_tp" else 1):
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.world > MOST_RANKS:
            raise ValueError(
                f"tp * attn_dp = {self.tp} * {self.attn_dp} = {self.world} ranks, expected at most {MOST_RANKS}"
            )
        if self.moe_tp == 0:
            if self.world % self.moe_ep:
                raise ValueError(
                    self._misfit(f"world % ep = {self.world} % {self.moe_ep} = {self.world % self.moe_ep}")
                )
            object.__setattr__(self, "moe_tp", self.world // self.moe_ep)
        if self.moe_tp * self.moe_ep != self.world:
            raise ValueError(
                self._misfit(
                    f"moe_tp * ep = {self.moe_tp} * {self.moe_ep} = {self.moe_tp * self.moe_ep} != {self.world}"
                )
            )

    @property
    def world(self) -> int:
        return self.tp * self.attn_dp

    def coordinates(self, rank: int) -> Coordinates:
        """Position of `rank` on every mesh axis; ValueError outside of `[0, world)`."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not in [0, world={self.world})")
        return Coordinates(rank % self.tp, rank // self.tp, rank // self.moe_ep, rank % self.moe_ep)

    def along(self, tp: Sequence[int], moe_tp: Sequence[int], moe_ep: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """For every rank in order what stands at its place on these mesh axes; as many of each as the axis is long."""
        over_groups, over_experts = repeat(tp, self.attn_dp), repeat(moe_ep, self.moe_tp)
        slow = (each for each in moe_tp for _ in range(self.moe_ep))
        return zip(chain.from_iterable(over_groups), slow, chain.from_iterable(over_experts), strict=True)

    def __str__(self) -> str:
        parts = [f"tp {self.tp}"]
        if self.attn_dp > 1:
            parts.append(f"attn_dp {self.attn_dp}")
        if self.moe_ep > 1 or self.moe_tp != self.tp:
            parts.append(f"moe_tp {self.moe_tp} x ep {self.moe_ep}")
        return ", ".join(parts)

    def _misfit(self, equation: str) -> str:
        wanted = self.moe_ep * max(self.moe_tp, 1)
        if wanted > self.world and wanted % self.tp == 0:
            offer = f"give --attn-dp {wanted // self.tp}, so that the world is {wanted}"
        elif self.world % self.moe_ep == 0:
            offer = f"leave --moe-tp out, so that it is {self.world // self.moe_ep}"
        else:
            fits = [ep for ep in range(1, self.world + 1) if self.world % ep == 0]
            offer = f"ep must divide the world; legal are {', '.join(map(str, fits))}"
        return (
            f"tp * attn_dp = world = moe_tp * ep does not hold: tp * attn_dp = {self.tp} * {self.attn_dp} "
            f"= {self.world}, {equation}: {offer}"
        )
