"""A group that runs some calls on its own kernels, all else on a fallback group of the same ranks; and one whose
sub-groups alone may be such.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardwise.comm.collective import BaseCommunicator
from shardwise.comm.p2p.streams import StreamOrder

FALLBACK_STRATEGIES = ("NCCL", "SYMM_MEM", "NCCL_SYMMETRIC")
"""Strategies that the fallback group runs, where it has NCCL."""


class Delegating(BaseCommunicator):
    """`fallback` moves CUDA tensors (NCCL, or MPI through pinned memory) and carries control messages."""

    devices: tuple[str, ...] = ("cuda",)

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

    def _split_fallback(self, name: str, colors: list[int], keys: list[int]) -> BaseCommunicator:
        group = self.fallback.split_known(colors, keys)
        assert isinstance(group, BaseCommunicator)
        group.name = name
        return group

    def _abort(self, reason: str) -> None:
        self._stop_waits()
        self.fallback.abort(reason)

    def _stop_waits(self) -> None:
        """End the waits on the device of this group and of those split off it, for this rank and its peers there."""
        for part in self._parts:
            if isinstance(part, Delegating):
                part._stop_waits()

    def close(self) -> None:
        self.fallback.broken = self.fallback.broken or self.broken  # a broken one does not wait for its members
        super().close()
        self.fallback.close()


class WithoutKernels(Delegating):
    """A group that own kernels do not serve (of several hosts, of another size) while those split off it may have some.

    All runs on `fallback`, in the order of the thread's calls, in which those of groups with kernels are.
    """

    def __init__(
        self, fallback: BaseCommunicator, reason: str, connect: Callable[[BaseCommunicator], BaseCommunicator]
    ):
        """`connect` makes a group of own kernels on a fallback, or another of this class."""
        super().__init__(fallback, fallback.transport)
        self.devices, self.strategies = fallback.devices, fallback.strategies
        self.reason = reason
        self._connect = connect
        on_gpu = torch.cuda.is_available()
        self._order = StreamOrder(torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))

    def explain(self, op: str, payload: int) -> str:
        return self.fallback.explain(op, payload)

    def _begin(self, op: str, shape, dtype, strategy: str, *details) -> list:
        self._order.take()
        return super()._begin(op, shape, dtype, strategy, *details)

    def _reduce(self, source: Tensor, target: Tensor, strategy: str) -> None:
        self.fallback._reduce(source, target, strategy)

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> BaseCommunicator:
        return self._connect(self._split_fallback(name, colors, keys))
