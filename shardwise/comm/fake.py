"""Transport `fake`: one process that plays one rank of any world. Shapes are right, values are this rank's own.

At world 1 it is exact and is what a single process runs on. At larger worlds it serves dry runs: every peer is
taken to hold the same values as this rank, so a sum is `size` times the input.
"""

from collections.abc import Sequence

from torch import Tensor

from shardwise.comm import watch
from shardwise.comm.collective import BaseCommunicator


class FakeCommunicator(BaseCommunicator):
    """Rank `rank` of a world whose other members are imagined."""

    devices = ("cpu", "cuda")

    def __init__(
        self,
        rank: int = 0,
        ranks: Sequence[int] = (0,),
        **options,
    ):
        super().__init__(rank=rank, ranks=ranks, transport="fake", **options)

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        if out is tensor and self.size == 1 and strategy == "AUTO" and self.broken is None:
            return tensor  # the decode path of a single process: nothing to do, so nothing is recorded
        return super().all_reduce(tensor, out=out, strategy=strategy)

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)
        if self.size > 1:
            target.mul_(self.size)

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        for part in joined.split(list(counts)):
            _fill(part, source)

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        self._all_reduce(joined.split(list(counts))[self.rank], target)

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        for part in target.split(list(receives)):
            _fill(part, source)

    def _exchange_sizes(self, sends: tuple[int, ...], receives: tuple[int, ...] | None) -> list[tuple[int, ...]]:
        return [(count,) * self.size for count in receives or (sends[self.rank],) * self.size]

    def _broadcast(self, data: Tensor, root: int) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def _exchange(self, blob: bytes) -> list[bytes]:
        return [blob] * self.size

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> "FakeCommunicator":
        return FakeCommunicator(
            members.index(self.rank),
            [self.ranks[i] for i in members],
            name=name,
            **self._settings,
        )

    def _forked(self) -> None:
        """It has no peers that could be disturbed."""

    def _abort(self, reason: str) -> None:
        watch.FLIGHT.dump(self._world_rank)


def _fill(part: Tensor, source: Tensor) -> None:
    """As much of `source` as an imagined peer's part holds, zeros beyond."""
    length = min(part.numel(), source.numel())
    part.zero_()[:length].copy_(source[:length])
