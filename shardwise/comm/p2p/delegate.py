"""A group whose all-reduce runs on its own kernels, and everything else on another group of the same ranks."""

from collections.abc import Sequence

from torch import Tensor

from shardwise.comm.collective import BaseCommunicator

BEYOND = ("NCCL", "SYMM_MEM", "NCCL_SYMMETRIC")
"""Strategies that are the other group's."""


class Delegating(BaseCommunicator):
    """`beyond` moves CUDA tensors (NCCL, or MPI through pinned memory) and carries control messages."""

    devices = ("cuda",)

    def __init__(self, beyond: BaseCommunicator, transport: str):
        super().__init__(
            rank=beyond.rank,
            ranks=beyond.ranks,
            transport=transport,
            name=beyond.name,
            **beyond._settings,
        )
        self.beyond = beyond
        own_kernels = ("AUTO", "MIN_LATENCY", "ONESHOT", "TWOSHOT")
        self.strategies = (*own_kernels, *BEYOND) if beyond.transport == "nccl" else own_kernels

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        self.beyond._all_reduce(source, target)

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        self.beyond._all_gather(source, joined, counts)

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        self.beyond._reduce_scatter(joined, counts, target)

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        self.beyond._all_to_all(source, target, sends, receives, longest)

    def _longest(self, sends: Sequence[int]) -> int:
        return self.beyond._longest(sends)

    def _broadcast(self, data: Tensor, root: int) -> None:
        self.beyond._broadcast(data, root)

    def _barrier(self) -> None:
        self.beyond._barrier()

    def _exchange(self, blob: bytes) -> list[bytes]:
        return self.beyond._exchange(blob)

    def _gather_control(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        self.beyond._gather_control(source, joined, counts)

    def _split_beyond(self, members: list[int], colors: list[int]) -> BaseCommunicator:
        order = [members.index(rank) if rank in members else 0 for rank in range(self.size)]
        group = self.beyond.split_known(colors, order)
        assert isinstance(group, BaseCommunicator)
        return group

    def _abort(self, reason: str) -> None:
        self.beyond.abort(reason)

    def close(self) -> None:
        super().close()
        self.beyond.close()


def with_reason(group: BaseCommunicator, reason: str) -> BaseCommunicator:
    """`group`, which says `reason` when asked why it serves."""
    group.reason = reason
    return group
