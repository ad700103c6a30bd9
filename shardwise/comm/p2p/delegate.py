"""A group whose all-reduce runs on its own kernels, and everything else on a fallback group of the same ranks."""

from collections.abc import Sequence

from torch import Tensor

from shardwise.comm.collective import BaseCommunicator

FALLBACK_STRATEGIES = ("NCCL", "SYMM_MEM", "NCCL_SYMMETRIC")
"""Strategies that the fallback group runs, where it has NCCL."""


class Delegating(BaseCommunicator):
    """`fallback` moves CUDA tensors (NCCL, or MPI through pinned memory) and carries control messages."""

    devices = ("cuda",)

    def __init__(self, fallback: BaseCommunicator, transport: str):
        super().__init__(
            rank=fallback.rank,
            ranks=fallback.ranks,
            transport=transport,
            name=fallback.name,
            **fallback._settings,
        )
        self.fallback = fallback
        own_kernels = ("AUTO", "MIN_LATENCY", "ONESHOT", "TWOSHOT")
        self.strategies = (*own_kernels, *FALLBACK_STRATEGIES) if fallback.transport == "nccl" else own_kernels

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        self.fallback._all_reduce(source, target)

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        self.fallback._all_gather(source, joined, counts)

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        self.fallback._reduce_scatter(joined, counts, target)

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        self.fallback._all_to_all(source, target, sends, receives, longest)

    def _longest(self, sends: Sequence[int]) -> int:
        return self.fallback._longest(sends)

    def _broadcast(self, data: Tensor, root: int) -> None:
        self.fallback._broadcast(data, root)

    def _barrier(self) -> None:
        self.fallback._barrier()

    def _exchange(self, blob: bytes) -> list[bytes]:
        return self.fallback._exchange(blob)

    def _gather_control(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        self.fallback._gather_control(source, joined, counts)

    def _split_fallback(self, colors: list[int], keys: list[int]) -> BaseCommunicator:
        group = self.fallback.split_known(colors, keys)
        assert isinstance(group, BaseCommunicator)
        return group

    def _abort(self, reason: str) -> None:
        self.fallback.abort(reason)

    def close(self) -> None:
        super().close()
        self.fallback.close()


def with_reason(group: BaseCommunicator, reason: str) -> BaseCommunicator:
    """`group`, which says `reason` when asked why it serves."""
    group.reason = reason
    return group
