"""Transports `gloo` and `nccl`: torch.distributed. Rides on an existing ProcessGroup, or makes one from a rendezvous.

Gloo sums are done in our own fixed order for 16-bit floats (gloo would round at every step); other dtypes use its
ring. NCCL sums in its own order and rounds 16-bit floats at every hop. Deterministic mode takes our order on both.
"""

import atexit
import contextlib
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.comm import compose, symmetric, window
from shardwise.comm.arguments import starts
from shardwise.comm.base import CommError, Unavailable
from shardwise.comm.bootstrap import Rendezvous, TorchStore
from shardwise.comm.collective import BaseCommunicator
from shardwise.comm.control import FRAME_BYTES, framed, unframed
from shardwise.comm.torch_group import ProcessGroupRendezvous, bound_end, leave, new_group, served_store, serves
from shardwise.comm.torch_wait import SLICE, WaitingCommunicator

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""torch 2.13 renames them; 2.11 knows the old names only."""
STAGED = {
    "SYMM_MEM": (symmetric, symmetric.SymmetricMemory),
    "NCCL_SYMMETRIC": (window, window.Window),
}
"""Strategies of NCCL groups that copy tensors into memory of their own, made at the first call."""
_joined: "weakref.WeakSet[TorchDistCommunicator]" = weakref.WeakSet()
"""Open worlds in a torch.distributed that was initialised here, for the first of them: it ends with the last."""


class TorchDistCommunicator(WaitingCommunicator):
    """One rank's end of a torch.distributed group."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        backend: str,
        store: TorchStore,
        *,
        ranks: Sequence[int] | None = None,
        control: BaseCommunicator | None = None,
        **options,
    ):
        torch_order = dist.get_process_group_ranks(group)
        ranks = list(ranks or torch_order)
        self.devices = ("cuda",) if backend == "nccl" else ("cpu",)
        if backend == "nccl":
            self.strategies = (*self.strategies, *STAGED)
        super().__init__(rank=ranks.index(dist.get_rank()), ranks=ranks, transport=backend, **options)
        self.group = group
        self.store = store
        self._place = [torch_order.index(rank) for rank in ranks]
        """Where torch has our ranks: it sorts the members of every group."""
        self._sorted = self._place == list(range(self.size))
        self.control = control
        """NCCL moves CUDA tensors only: control messages go through a CPU group of the same ranks."""
        self._own_group = False
        """`group` was made here, beside others of the process: it goes when this communicator is closed."""
        self._stages: dict[str, Any] = {}

    @classmethod
    def join(cls, meeting: Rendezvous, backend: str, **options) -> "TorchDistCommunicator":
        """Group of `meeting`'s ranks; torch.distributed is initialised if it is not yet."""
        limit = options["deadlines"].rendezvous
        store = served_store(meeting, limit)
        owner = not dist.is_initialized()
        if owner:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("torch", store.store),
                rank=meeting.rank,
                world_size=meeting.size,
                timeout=timedelta(seconds=max(options["deadlines"].collective, options["deadlines"].load)),
            )
            group = dist.group.WORLD
            assert group is not None
        else:
            group = dist.new_group(list(meeting.ranks), backend=backend)
        communicator = cls(group, backend, store, **options)
        communicator._own_group = not owner
        if owner or _joined:
            _joined.add(communicator)
        if owner:
            atexit.register(leave, options["deadlines"].stop)
            os.register_at_fork(after_in_child=lambda: atexit.unregister(leave))
        return communicator

    @classmethod
    def adopt(cls, group: dist.ProcessGroup, backend: str, **options) -> "TorchDistCommunicator":
        """Ride on `group`, which stays the caller's; where it is of another backend, on one of ours of its ranks."""
        store = served_store(ProcessGroupRendezvous(group), options["deadlines"].rendezvous)
        if serves(group, backend):
            return cls(group, backend, store, **options)
        ranks = dist.get_process_group_ranks(group)
        communicator = cls(new_group(ranks, backend, store.mark), backend, store, **options)
        communicator._own_group = True
        return communicator

    def _reduce(self, source: Tensor, target: Tensor, strategy: str) -> None:
        if strategy in STAGED:
            with self._calls():
                self._stage(strategy, source).all_reduce(source.view(-1), target.view(-1))
        else:
            super()._reduce(source, target, strategy)

    def _stage(self, strategy: str, source: Tensor):
        """Shared memory for tensors like `source`. Raises Unavailable on every rank when it cannot be made on one."""
        module, maker = STAGED[strategy]
        module.require_dtype(source.dtype)
        if strategy not in self._stages:
            tell = (self.control or self).all_gather_object
            reasons = tell(module.obstacle(self.size, torch.cuda.is_current_stream_capturing()))
            for rank, text in zip(self.ranks, reasons, strict=True):
                if text:
                    raise Unavailable(f"strategy {strategy} cannot run on group {self.name}: rank {rank}: {text}")
            self._stages[strategy] = maker(self.group, source.device, tell)
        return self._stages[strategy]

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        if source.dtype in compose.HALVES and self.transport == "gloo" and self.size > 2:
            self._reduce_two_shot(source, target)
            return
        wide = source.int() if source.dtype == torch.int16 else None
        if wide is None and source.data_ptr() != target.data_ptr():
            target.copy_(source)
        buffer = target if wide is None else wide
        with self._calls():
            self._done(dist.all_reduce(buffer, group=self.group, async_op=True))
        if wide is not None:
            target.copy_(wide)

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        with self._calls():
            if self._sorted and len(set(counts)) == 1:
                self._done(_gather(joined, source, group=self.group, async_op=True))
                return
            longest = max(counts)
            padded = source.new_zeros(longest)
            padded[: source.numel()] = source
            gathered = source.new_empty(longest * self.size)
            self._done(_gather(gathered, padded, group=self.group, async_op=True))
        rows = gathered.view(self.size, longest)
        for place, start, count in zip(self._place, starts(counts), counts, strict=True):
            joined[start : start + count].copy_(rows[place, :count])

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        native = self.transport == "nccl" and self._sorted and len(set(counts)) == 1 and joined.dtype != torch.int16
        if not native or self.deterministic:
            self._ordered_reduce_scatter(joined, counts, target)
            return
        with self._calls():
            self._done(_scatter(target, joined, group=self.group, async_op=True))

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        sends, receives = list(sends), list(receives)
        outgoing, incoming = source, target
        if not self._sorted:
            order = sorted(range(self.size), key=self._place.__getitem__)
            parts = source.split(sends)
            outgoing, incoming = torch.cat([parts[rank] for rank in order]), torch.empty_like(target)
            sends, receives = [sends[rank] for rank in order], [receives[rank] for rank in order]
        with self._calls():
            self._done(dist.all_to_all_single(incoming, outgoing, receives, sends, group=self.group, async_op=True))
        if not self._sorted:
            parts = incoming.split(receives)
            target.copy_(torch.cat([parts[place] for place in self._place]))

    def _broadcast(self, data: Tensor, root: int) -> None:
        with self._calls():
            self._done(dist.broadcast(data, group_src=self._place[root], group=self.group, async_op=True))

    def _barrier(self) -> None:
        if self.control is not None:
            torch.cuda.current_stream().synchronize()
            self.control.barrier()
            return
        self._exchange(b"")

    def _exchange(self, blob: bytes) -> list[bytes]:
        if self.control is not None:
            return self.control._exchange(blob)
        joined = torch.empty(FRAME_BYTES * self.size, dtype=torch.uint8, device="cpu")
        self._all_gather(torch.frombuffer(framed(blob), dtype=torch.uint8), joined, [FRAME_BYTES] * self.size)
        return unframed(joined.numpy().tobytes())

    def _gather_control(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        (self.control or self)._all_gather(source, joined, counts)

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> "TorchDistCommunicator":
        ranks = [self.ranks[i] for i in members]
        group = new_group(ranks, self.transport, f"{self.store.mark}-{self.transport}-{name}")
        control = None if self.control is None else self.control.split_known(colors, keys)
        part = TorchDistCommunicator(
            group,
            self.transport,
            self.store,
            ranks=ranks,
            control=control,
            name=name,
            **self._settings,
        )
        part._own_group = True
        return part

    def _fail(self, error: CommError) -> CommError:
        if self.transport == "gloo" and self.broken is None:
            bound_end(self.deadlines.stop)
        return super()._fail(error)

    def _abort(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0 may be gone, and the store with it
            self.store.set("abort", reason.encode())
            time.sleep(2 * SLICE.total_seconds())  # peers look once a slice; this rank may serve the store, and leave
        if self.control is not None:
            self.control.abort(reason)

    def close(self) -> None:
        healthy = self.broken is None
        super().close()
        if self.control is not None:
            self.control.close()
        if healthy:
            for stage in self._stages.values():
                stage.close()
        ended = True
        if self._own_group and healthy:  # a broken one may not end; leaving the world ends it
            ended = leave(self.deadlines.stop, self.group)
        if self in _joined:
            _joined.remove(self)
            if not _joined and ended:
                ended = leave(self.deadlines.stop)
        if healthy and not ended:
            warnings.warn(
                f"group {self.name} was not closed within {self.deadlines.stop:g} s: if a CUDA graph holds calls of "
                "it, delete the graph before you close the group",
                stacklevel=2,
            )
