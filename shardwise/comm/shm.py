"""Transport `shm`: shared memory between the ranks of one host, CPU tensors.

Payloads beyond a half's capacity go in chunks, one round each (`chunks.py`); or, where the kernel lets processes read
each other (`direct.py`), straight from tensor to tensor with one copy less.

The all-reduce of a decode step (a few KiB, sixty times a token) has its own path without allocation: views of the
memory are kept by (dtype, shape), and one round is one copy, one flag, one add.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise import partition
from shardwise.comm import compose, control, direct, watch
from shardwise.comm.accumulate import Accumulator, SlotAccumulator
from shardwise.comm.arguments import starts
from shardwise.comm.base import CommError, PeerLost
from shardwise.comm.bootstrap import Rendezvous
from shardwise.comm.chunks import CHUNK, ChunkedCommunicator, half_bytes, typed
from shardwise.comm.control import EXCHANGE
from shardwise.comm.segment import Segment, WaitFailed
from shardwise.comm.sharing import share
from shardwise.comm.watch import FLIGHT

ONE_PHASE_TOTAL = 512 * 1024
"""Bytes of all ranks together up to which every rank sums everything itself; beyond, each sums its part and the parts
are gathered. Measured at two ranks: 45 µs either way at 256 KiB each."""
DIRECT_LIMIT = 1024 * 1024
"""Bytes up to which shared memory beats reading the peers: 190 against 200 µs at 1 MiB, 410 against 330 at 2 MiB."""
DIRECT_BLOCK = 512 * 1024
"""Bytes read from a peer at a time when they are to be summed: still in the cache then, and few system calls."""
KEPT_PLANS = 512


class ShmCommunicator(ChunkedCommunicator):
    """One rank's end of a group in shared memory. Made by `join` or `split`."""

    def __init__(self, segment: Segment, ranks: Sequence[int], *, reads_peers: bool = False, **options):
        super().__init__(rank=segment.rank, ranks=ranks, transport="shm", **options)
        self.segment = segment
        self.reads_peers = reads_peers
        self._scratch: Tensor | None = None
        self._one_phase_limit = ONE_PHASE_TOTAL // self.size
        self._root_words = segment.root.words
        self._plans: dict[tuple, tuple | None] = {}
        with torch.inference_mode(False):  # views made in inference mode could not be written outside of it
            memory = torch.frombuffer(segment.map, dtype=torch.uint8)
            self._halves = tuple(
                tuple(memory[segment.half_offset(rank, parity) :][: segment.half] for rank in range(self.size))
                for parity in (0, 1)
            )

    @classmethod
    def join(cls, meeting: Rendezvous, *, cores: int, **options) -> "ShmCommunicator":
        """World group of `meeting`'s ranks. Raises CommError on every rank if one cannot share memory."""
        limit = options["deadlines"].rendezvous
        try:
            segment = share(
                lambda key, value: meeting.gather(key, value, limit),
                list(range(meeting.size)),
                meeting.rank,
                half_bytes(meeting.size),
                key="shm",
                crowded=meeting.size > cores,
            )
        except OSError as error:
            raise CommError(f"shared memory cannot be made: {error}") from None
        addresses = meeting.gather("shm/probe", direct.probe_address(), limit)
        tries = [direct.readable(segment.members[peer].pid, addresses[peer])[0] for peer, _ in segment.others]
        reads_peers = all(meeting.gather("shm/reads", all(tries), limit))
        return cls(segment, meeting.ranks, reads_peers=reads_peers, **options)

    def explain(self, op: str, payload: int) -> str:
        if not op.startswith("all_reduce"):
            return f"rounds of {CHUNK >> 10} KiB a rank"
        if payload <= self._one_phase_limit:
            return f"ONESHOT: every rank sums all, measured faster up to {self._one_phase_limit >> 10} KiB"
        if payload > DIRECT_LIMIT and self.reads_peers:
            return f"TWOSHOT out of the peers' tensors: measured faster beyond {DIRECT_LIMIT >> 10} KiB"
        return f"TWOSHOT in shared memory: each rank sums its part, faster beyond {self._one_phase_limit >> 10} KiB"

    # The decode path

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        plan = self._plans.get((tensor.dtype, tensor.shape))
        if plan is None or strategy != "AUTO" or self.check or tensor.requires_grad or not tensor.is_cpu:
            return self._all_reduce_any(tensor, out, strategy)
        if out is None:
            out = torch.empty_like(tensor)
        elif out is not tensor and (out.shape != tensor.shape or out.dtype != tensor.dtype or out.requires_grad):
            return super().all_reduce(tensor, out=out)  # which raises, or looks past the gradient
        segment = self.segment
        slots = plan[(segment.epoch + 1) & 1]
        slots[self.rank].copy_(tensor)
        entry = self.begin_round(("all_reduce", tensor.shape, tensor.dtype, "AUTO"), plan[2])
        compose.ordered_sum(slots, out)
        entry[watch.END] = watch.now()
        return out

    def begin_round(self, call: tuple, number: int) -> list:
        """A round of a recorded (op, shape, dtype, strategy), outside of check mode; its entry, still to be ended.

        number  `control.call_number` of it
        """
        if self.broken is not None or self._root_words[0]:
            raise self._refused(call[0])
        self.sequence = sequence = self.sequence + 1
        entry = [sequence, *call, self.name, self._world_rank, watch.now(), 0]
        FLIGHT.ring.append(entry)
        try:  # the limit as `_limit` has it, without two calls, sixty times a token
            self.segment.round(self.deadlines.in_phase(watch._phase), number)
        except WaitFailed as error:
            raise self._broken_round(error) from None
        return entry

    def _all_reduce_any(self, tensor: Tensor, out: Tensor | None, strategy: str) -> Tensor:
        """The general path; small shapes are planned here for the next time."""
        if self._fits(tensor):
            compose.require_summable(tensor.dtype, "all_reduce")
            if len(self._plans) >= KEPT_PLANS:
                self._plans.clear()
            number = control.call_number("all_reduce", tensor.shape, tensor.dtype, "AUTO")
            self._plans[tensor.dtype, tensor.shape] = *self._slots_like(tensor), number
        return super().all_reduce(tensor, out=out, strategy=strategy)

    def accumulator(self, total: Tensor) -> Accumulator:
        if self.check or not self._fits(total) or total.dtype in compose.HALVES:  # those are to be rounded once
            return super().accumulator(total)
        return SlotAccumulator(self, total, self._slots_like(total))

    def _fits(self, tensor: Tensor) -> bool:
        return 0 < tensor.nbytes <= self._one_phase_limit and tensor.is_cpu

    def _slots_like(self, tensor: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """For even and odd rounds, all ranks' slots as tensors of this dtype and shape."""
        with torch.inference_mode(False):
            return tuple(
                tuple(typed(half, tensor.dtype, tensor.numel()).view(tensor.shape) for half in halves)
                for halves in self._halves
            )

    # Rounds

    def _limit(self) -> float:
        """Seconds that a round may take."""
        return self.deadlines.in_phase(watch.current_phase())

    def _round(self) -> None:
        try:
            self.segment.round(self._limit(), self._call_number())
        except WaitFailed as error:
            raise self._broken_round(error) from None

    def _exchange(self, blob: bytes, call: int = EXCHANGE) -> list[bytes]:
        try:
            return self.segment.frame_round(blob, self._limit(), call)
        except WaitFailed as error:
            raise self._broken_round(error) from None

    def _broken_round(self, error: WaitFailed) -> CommError:
        if error.kind == "differs":  # every rank has seen it, or will at its arrival
            try:
                self._compare(self.segment.calls(self._fingerprint(), self._limit()))
            except WaitFailed as later:  # a rank has seen it and is gone
                error = later
        return self._fail(error.explained(self._where(self._last_entry()), self.ranks))

    def _refused(self, op: str) -> CommError:
        reason = self.broken or self.segment.aborted
        return CommError(f"{op} on group {self.name}, rank {self._world_rank}: {reason}")

    def _begin(self, op: str, shape, dtype, strategy: str, *details) -> list:
        if self.broken is None and self._root_words[0]:
            self.broken = self.segment.aborted
        return super()._begin(op, shape, dtype, strategy, *details)

    def _writing(self) -> tuple[Tensor, ...]:
        """All ranks' halves of the round that comes next."""
        return self._halves[(self.segment.epoch + 1) & 1]

    # Collectives on flat tensors

    def _reduce(self, source: Tensor, target: Tensor, strategy: str) -> None:
        source, target = source.view(-1), target.view(-1)
        small = source.numel() * source.element_size() <= self._one_phase_limit
        if strategy in ("ONESHOT", "MIN_LATENCY") or (strategy in ("AUTO", "NCCL") and small):
            self._reduce_one_shot(source, target)
        elif self.reads_peers and source.nbytes > DIRECT_LIMIT:
            self._all_reduce_direct(source, target)
        else:
            self._all_reduce(source, target)

    def _addresses(self, *tensors: Tensor) -> list[list[int]]:
        """Where all ranks have each of their `tensors`; a round, after which they may be read."""
        mine = b"".join(control.number(tensor.data_ptr()) for tensor in tensors)
        messages = self._exchange(mine, self._call_number())  # nothing is read for a peer that calls something else
        return [list(each) for each in zip(*map(control.numbers, messages), strict=True)]

    def _pull(self, peer: int, address: int, into: Tensor) -> None:
        member = self.segment.members[peer]
        try:
            direct.pull(member.pid, address, into)
        except OSError as error:
            where = self._where(self._last_entry())
            rank = self.ranks[peer]
            raise self._fail(PeerLost(f"{where}: rank {rank} cannot be read: {error}", (rank,))) from None

    def _all_reduce_direct(self, source: Tensor, target: Tensor) -> None:
        """Each rank sums its part out of all tensors, then reads the other parts where they were summed."""
        width = source.element_size()
        counts = partition.lengths(source.numel(), self.size)
        places = starts(counts)
        start, stop = places[self.rank], places[self.rank] + counts[self.rank]
        inputs, results = self._addresses(source, target)
        self._sum_direct(source[start:stop], target[start:stop], inputs, start * width)
        self._round()
        for peer, _ in self.segment.others:
            part = target[places[peer] : places[peer] + counts[peer]]
            self._pull(peer, results[peer] + places[peer] * width, part)
        self._round()  # nobody may overwrite its tensor before all have read it

    def _sum_direct(self, source: Tensor, target: Tensor, addresses: list[int], offset: int) -> None:
        """Sum of all ranks' memory at `addresses` + offset, of which this rank's is `source`, block by block."""
        width = source.element_size()
        block = DIRECT_BLOCK // width
        if self._scratch is None:
            self._scratch = torch.empty((self.size, DIRECT_BLOCK), dtype=torch.uint8, device="cpu")
        for place in range(0, source.numel(), block):
            mine = source[place : place + block]
            terms = [typed(row, source.dtype, mine.numel()) for row in self._scratch]
            for peer, _ in self.segment.others:
                self._pull(peer, addresses[peer] + offset + place * width, terms[peer])
            terms[self.rank] = mine
            compose.ordered_sum(terms, target[place : place + block])

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        if not self.reads_peers or max(counts) <= CHUNK:
            super()._all_gather(source, joined, counts)
            return
        parts = joined.split(list(counts))
        parts[self.rank].copy_(source)
        addresses = self._addresses(source)[0]
        for peer, _ in self.segment.others:
            self._pull(peer, addresses[peer], parts[peer])
        self._round()

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        if not self.reads_peers or joined.nbytes <= DIRECT_LIMIT:
            super()._reduce_scatter(joined, counts, target)
            return
        start = starts(counts)[self.rank]
        mine = joined[start : start + counts[self.rank]]
        self._sum_direct(mine, target, self._addresses(joined)[0], start * target.element_size())
        self._round()

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> "ShmCommunicator":
        segment = share(
            lambda key, value: self.all_gather_object(value),
            members,
            members.index(self.rank),
            half_bytes(len(members)),
            key=name,
            crowded=self.segment.spins == 0,
            root=self.segment.root,
        )
        return ShmCommunicator(
            segment,
            [self.ranks[i] for i in members],
            reads_peers=self.reads_peers,
            name=name,
            **self._settings,
        )

    def _abort(self, reason: str) -> None:
        self.segment.abort(reason)

    def _forked(self) -> None:
        super()._forked()
        self._plans.clear()  # by which a sum is written before anything is asked

    def close(self) -> None:
        super().close()
        self.segment.leave()
        self._plans.clear()
        self._halves = ()
        self._scratch = None
