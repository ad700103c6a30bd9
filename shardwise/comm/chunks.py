"""Collectives in rounds of chunks: each rank writes its own memory, meets the others, and reads theirs.

Sums run in rank order (rank 0 first) whatever the algorithm, so all ranks get the same bits at every size.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise import partition
from shardwise.comm import compose
from shardwise.comm.collective import BaseCommunicator

CHUNK = 512 * 1024
"""Bytes of a chunk: two ranks' chunks and results stay in a 2 MiB second-level cache."""


class ChunkedCommunicator(BaseCommunicator):
    """Of ranks that see each other's halves: `half_bytes` of memory for each parity of a round."""

    @abstractmethod
    def _writing(self) -> Sequence[Tensor]:
        """All ranks' halves of the round that comes next, uint8."""

    @abstractmethod
    def _round(self) -> None:
        """Show the half that was written; return when the others' may be read, until the round after the next."""

    def _reduce_one_shot(self, source: Tensor, target: Tensor) -> None:
        chunk = CHUNK // source.element_size()
        for piece, result in zip(source.split(chunk), target.split(chunk), strict=True):
            slots = [typed(half, source.dtype, piece.numel()) for half in self._writing()]
            slots[self.rank].copy_(piece)
            self._round()
            compose.ordered_sum(slots, result)

    def _all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Reduce-scatter and all-gather; the gather of one chunk shares its round with the scatter of the next."""
        chunk = CHUNK // source.element_size()
        pieces, results = source.split(chunk), target.split(chunk)
        for number in range(len(pieces) + 1):
            halves = self._writing()
            ahead = _Chunk(halves, pieces[number], self) if number < len(pieces) else None
            behind = results[number - 1] if number else None
            if ahead:
                ahead.write()
            if behind is not None:
                self._write_result(halves, behind)
            self._round()
            if ahead:
                ahead.sum_into(results[number])
            if behind is not None:
                self._read_results(halves, behind)

    def _write_result(self, halves: Sequence[Tensor], result: Tensor) -> None:
        start, stop = partition.extent(result.numel(), self.size, self.rank)
        typed(halves[self.rank][CHUNK:], result.dtype, stop - start).copy_(result[start:stop])

    def _read_results(self, halves: Sequence[Tensor], result: Tensor) -> None:
        for peer in range(self.size):
            if peer != self.rank:
                start, stop = partition.extent(result.numel(), self.size, peer)
                result[start:stop].copy_(typed(halves[peer][CHUNK:], result.dtype, stop - start))

    def _all_gather(self, source: Tensor, joined: Tensor, counts: Sequence[int]) -> None:
        parts = joined.split(list(counts))
        parts[self.rank].copy_(source)
        for start in range(0, max(counts), CHUNK):
            halves = self._writing()
            mine = source[start : start + CHUNK]
            halves[self.rank][: mine.numel()].copy_(mine)
            self._round()
            for peer, part in enumerate(parts):
                piece = part[start : start + CHUNK]
                if peer != self.rank and piece.numel():
                    piece.copy_(halves[peer][: piece.numel()])

    def _reduce_scatter(self, joined: Tensor, counts: Sequence[int], target: Tensor) -> None:
        width = target.element_size()
        quota = CHUNK // self.size // width
        for start in range(0, max(counts), quota):
            halves = self._writing()
            for peer, part in enumerate(joined.split(list(counts))):
                piece = part[start : start + quota]
                typed(halves[self.rank][peer * quota * width :], part.dtype, piece.numel()).copy_(piece)
            self._round()
            result = target[start : start + quota]
            if result.numel():
                place = self.rank * quota * width
                compose.ordered_sum([typed(h[place:], target.dtype, result.numel()) for h in halves], result)

    def _all_to_all(
        self, source: Tensor, target: Tensor, sends: Sequence[int], receives: Sequence[int], longest: int | None
    ) -> None:
        outgoing, incoming = source.split(list(sends)), target.split(list(receives))
        incoming[self.rank].copy_(outgoing[self.rank])
        quota = CHUNK // self.size
        for start in range(0, self._longest(sends) if longest is None else longest, quota):
            halves = self._writing()
            for peer, part in enumerate(outgoing):
                piece = part[start : start + quota]
                if peer != self.rank and piece.numel():
                    halves[self.rank][peer * quota :][: piece.numel()].copy_(piece)
            self._round()
            for peer, part in enumerate(incoming):
                piece = part[start : start + quota]
                if peer != self.rank and piece.numel():
                    piece.copy_(halves[peer][self.rank * quota :][: piece.numel()])

    def _broadcast(self, data: Tensor, root: int) -> None:
        for piece in data.split(CHUNK):
            halves = self._writing()
            if self.rank == root:
                halves[root][: piece.numel()].copy_(piece)
            self._round()
            if self.rank != root:
                piece.copy_(halves[root][: piece.numel()])

    def _barrier(self) -> None:
        self._round()

    def _empty_call(self) -> None:
        self._round()


class _Chunk:
    """One chunk of a two-phase all-reduce: everyone's parts of it lie in the halves, this rank sums its own part."""

    def __init__(self, halves: Sequence[Tensor], source: Tensor, group: ChunkedCommunicator):
        self.source = source
        self.rank = group.rank
        self.size = group.size
        self.slots = [typed(half, source.dtype, source.numel()) for half in halves]

    def _extent(self, rank: int) -> slice:
        return slice(*partition.extent(self.source.numel(), self.size, rank))

    def write(self) -> None:
        if self.size == 2:  # nobody reads this rank's own part
            part = self._extent(1 - self.rank)
            self.slots[self.rank][part].copy_(self.source[part])
        else:
            self.slots[self.rank].copy_(self.source)

    def sum_into(self, result: Tensor) -> None:
        part = self._extent(self.rank)
        terms = [slot[part] for slot in self.slots]
        if self.size == 2:
            terms[self.rank] = self.source[part]
        compose.ordered_sum(terms, result[part])


def half_bytes(size: int) -> int:
    """Bytes of a half: a chunk, and this rank's part of the chunk before."""
    return CHUNK + -(-CHUNK // size // 64) * 64 + 64


def typed(memory: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    return memory[: count * dtype.itemsize].view(dtype)
