"""Transport `mpi`: mpi4py (`mpi_library.py`).

CPU tensors go through the buffer protocol without a copy; bf16 and fp16, which MPI cannot add, are summed as float32,
integers of 8 and 16 bits as int32. CUDA tensors are staged through pinned host memory, unless the library itself says
that it takes device pointers.

MPI's blocking calls are the fast ones and cannot be left, so ranks meet first (`arrival.py`: with a deadline, and
naming who is missing) and only then enter the library together. Non-blocking and persistent forms, which could be left,
take three times as long at 4 KiB: 9.3 and 8.0 us, where the blocking call takes 2.5 and the meeting 0.3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.comm import control, mpi_library, watch
from shardwise.comm.arguments import starts
from shardwise.comm.arrival import Arrivals, MessageArrivals, SegmentArrivals, free, owned
from shardwise.comm.base import CommError
from shardwise.comm.collective import BaseCommunicator
from shardwise.comm.control import CALL_BITS, EXCHANGE, FRAME_BYTES, framed, unframed
from shardwise.comm.segment import FEW_SPINS, Segment, WaitFailed
from shardwise.comm.watch import END, FLIGHT, now

PIECE = 1 << 28
"""Elements of one call: MPI counts are 32-bit integers."""
SUMMED_AS = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.int16: torch.int32,
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
}
"""What MPI has no type for; and small integers: Open MPI's vector instructions saturate where its other code wraps."""
KEPT_PLANS = 512


class MpiCommunicator(BaseCommunicator):
    """One rank's end of an MPI communicator, which stays the caller's."""

    devices = ("cpu", "cuda")

    def __init__(self, comm, ranks: Sequence[int] | None = None, *, arrivals: Arrivals | None = None, **options):
        super().__init__(rank=comm.Get_rank(), ranks=ranks or mpi_library.world_ranks(comm), transport="mpi", **options)
        self.comm = comm
        self._mpi = mpi_library.load()
        self._types = mpi_library.datatypes()
        self._arrivals = arrivals or _arrivals(comm, options["deadlines"].rendezvous)
        self._allreduce, self._in_place = comm.Allreduce, self._mpi.IN_PLACE
        self._plans: dict[tuple, tuple] = {}

    # The decode path

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        plan = self._plans.get((tensor.data_ptr(), tensor.shape, tensor.dtype))
        if plan is None or out is not tensor or strategy != "AUTO" or not tensor.is_contiguous():
            return self._all_reduce_any(tensor, out, strategy)
        spec, call, number, segment, words, flag, peers, root = plan
        if self.broken is not None or root[0] or self.check or self.deterministic:
            return self._all_reduce_any(tensor, out, strategy)
        segment.epoch = epoch = segment.epoch + 1
        odd, shown = epoch & 1, epoch << CALL_BITS | number
        words[flag + odd] = shown  # the peers see it while this rank keeps its books
        self.sequence = sequence = self.sequence + 1
        entry = [sequence, *call, now(), 0]
        FLIGHT.ring.append(entry)
        for peer in peers[odd]:
            looks = FEW_SPINS  # here, as a call of the wait takes longer than a peer lags behind
            while words[peer] != shown:
                looks -= 1
                if not looks:
                    self._await(segment, shown)
        self._allreduce(self._in_place, spec)
        entry[END] = now()
        return tensor

    def _all_reduce_any(self, tensor: Tensor, out: Tensor | None, strategy: str) -> Tensor:
        """The general path; tensors that MPI can sum where they lie are planned here for the next time."""
        as_it_lies = tensor.is_cpu and tensor.dtype in self._types and tensor.dtype not in SUMMED_AS
        if out is tensor and as_it_lies and 0 < tensor.numel() <= PIECE:
            self._plan(tensor)
        return super().all_reduce(tensor, out=out, strategy=strategy)

    def _plan(self, tensor: Tensor) -> None:
        """What a call on this memory needs, in one tuple. The address in it is good as long as a tensor has it."""
        arrivals = self._arrivals
        if not isinstance(arrivals, SegmentArrivals):
            return
        if len(self._plans) >= KEPT_PLANS:
            self._plans.clear()
        segment = arrivals.segment
        call = ("all_reduce", tensor.shape, tensor.dtype, "AUTO", self.name, self._world_rank)
        number = control.call_number(*call[:4])
        meeting = (number, segment, segment.words, segment.flag, segment.peer_words, segment.root.words)
        self._plans[tensor.data_ptr(), tensor.shape, tensor.dtype] = (self._buffer(tensor), call, *meeting)

    # Meeting, then moving

    def _meet(self, call: int | None = None) -> None:
        """`call`: number that the ranks compare; None: of what this rank has begun."""
        try:
            number = self._call_number() if call is None else call
            self._arrivals.meet(self.deadlines.in_phase(watch.current_phase()), number)
        except WaitFailed as error:
            raise self._missing(error) from None

    def _await(self, segment: Segment, shown: int) -> None:
        """The wait of a meeting at which this rank has arrived."""
        try:
            segment.wait(shown, self.deadlines.in_phase(watch.current_phase()))
        except WaitFailed as error:
            raise self._missing(error) from None

    def _missing(self, error: WaitFailed) -> CommError:
        if error.kind == "differs":  # every rank has seen it, or will at its arrival
            limit = self.deadlines.in_phase(watch.current_phase())
            try:
                self._compare(self._arrivals.calls(self._fingerprint(), limit))
            except WaitFailed as later:  # a rank has seen it and is gone
                error = later
        return self._fail(error.explained(self._where(self._last_entry()), self.ranks))

    def _host(self, tensor: Tensor, *, filled: bool = True) -> Tensor:
        """The tensor itself where MPI can read it, else pinned host memory (`filled` with its values)."""
        if tensor.is_cpu:
            return tensor
        if mpi_library.takes_device_pointers()[0]:
            torch.cuda.current_stream(tensor.device).synchronize()
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor) if filled else host

    def _buffer(self, tensor: Tensor, *extra) -> list:
        """What mpi4py takes: memory, counts, datatype. By address, as numpy's view of a tensor takes longer to make."""
        memory = self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
        return [memory, *extra, self._types[tensor.dtype]]

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        if source.dtype in SUMMED_AS:
            wide = source.to(SUMMED_AS[source.dtype])
            self._all_reduce(wide, wide)
            target.copy_(wide)
            return
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)
        host = self._host(target)  # which waits for the copy
        self._meet()
        for piece in host.split(PIECE):
            self.comm.Allreduce(self._mpi.IN_PLACE, self._buffer(piece))
        if host is not target:
            target.copy_(host)

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        host = self._host(joined, filled=False)
        self._meet()
        if joined.numel() <= PIECE:
            places = (list(counts), starts(counts))
            self.comm.Allgatherv(self._buffer(self._host(source)), self._buffer(host, *places))
        else:
            parts = host.split(list(counts))
            parts[self.rank].copy_(source)
            if host.is_cuda:
                torch.cuda.current_stream(host.device).synchronize()
            for root, part in enumerate(parts):
                for piece in part.split(PIECE):
                    self.comm.Bcast(self._buffer(piece), root=root)
        if host is not joined:
            joined.copy_(host)

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        sends, receives = list(sends), list(receives)
        host = self._host(target, filled=False)
        outgoing = self._host(source)
        longest = self._longest(sends) if longest is None else longest
        self._meet()
        if longest * self.size <= PIECE:
            self.comm.Alltoallv(
                self._buffer(outgoing, sends, starts(sends)), self._buffer(host, receives, starts(receives))
            )
        else:
            self._all_to_all_by_pairs(outgoing.split(sends), host.split(receives))
        if host is not target:
            target.copy_(host)

    def _all_to_all_by_pairs(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        for distance in range(self.size):
            to, origin = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            requests = [self.comm.Irecv(self._buffer(p), source=origin) for p in incoming[origin].split(PIECE)]
            requests += [self.comm.Isend(self._buffer(p), dest=to) for p in outgoing[to].split(PIECE)]
            self._mpi.Request.Waitall(requests)

    def _broadcast(self, data: Tensor, root: int) -> None:
        host = self._host(data)
        self._meet()
        for piece in host.split(PIECE):
            self.comm.Bcast(self._buffer(piece), root=root)
        if host is not data:
            data.copy_(host)

    def _barrier(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._meet()

    def _empty_call(self) -> None:
        self._meet()

    def _exchange(self, blob: bytes) -> list[bytes]:
        frames = bytearray(FRAME_BYTES * self.size)
        self._meet(EXCHANGE)
        self.comm.Allgather([framed(blob), self._mpi.BYTE], [frames, self._mpi.BYTE])
        return unframed(frames)

    def _split(self, name: str, members: list[int], colors: list[int], keys: list[int]) -> "MpiCommunicator":
        self._meet()
        comm = owned(self.comm.Split(colors[self.rank], members.index(self.rank)))
        group = MpiCommunicator(
            comm,
            [self.ranks[i] for i in members],
            arrivals=self._arrivals.split(comm, members),
            name=name,
            **self._settings,
        )
        return group

    def close(self) -> None:
        healthy = self.broken is None
        super().close()
        if healthy:  # a broken one may have calls under way; it goes with the process
            self._arrivals.close()
            free(self.comm)

    def _abort(self, reason: str) -> None:
        self._arrivals.abort(reason)


def _arrivals(comm, limit: float) -> Arrivals:
    """Shared memory where all ranks are on one host, else messages."""
    shared = SegmentArrivals.try_make(mpi_library.MpiRendezvous(comm), limit)
    return shared or MessageArrivals(comm)
