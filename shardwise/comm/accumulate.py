"""Sums over a group that are added to a tensor: what a row-parallel product and a residual connection do together.

A rank's term is written by whatever computes it into the place that the transport names, and is added to the total from
where the ranks have put theirs: on shared memory nothing is copied in between.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardwise.comm import control, watch

if TYPE_CHECKING:
    from shardwise.comm.base import Communicator
    from shardwise.comm.shm import ShmCommunicator


class Accumulator:
    """Adds sums over `group` to `total`, with any transport. Every rank gets the same bits where totals were equal.

    Each rank writes its term into `term()`, a tensor like `total`, and then all call `add()`, with no other collective
    of the group in between.
    """

    def __init__(self, group: "Communicator", total: Tensor):
        self._group = group if group.size > 1 else None
        self.total = total
        self._term = torch.empty_like(total)

    def term(self) -> Tensor:
        return self._term

    def add(self) -> None:
        if self._group is not None:
            self._group.all_reduce(self._term, out=self._term)
        self.total.add_(self._term)


class SlotAccumulator(Accumulator):
    """On shared memory: terms are written into the ranks' slots and added from there, rank 0's first."""

    def __init__(self, group: "ShmCommunicator", total: Tensor, slots: Sequence[Sequence[Tensor]]):
        """slots: for even and odd rounds, the place of each rank's term."""
        self.total = total
        self._shm, self._segment, self._slots = group, group.segment, slots
        self._mine = [each[group.rank] for each in slots]
        self._call = ("all_reduce", total.shape, total.dtype, "AUTO")
        self._number = control.call_number(*self._call)

    def term(self) -> Tensor:
        return self._mine[(self._segment.epoch + 1) & 1]

    def add(self) -> None:
        entry = self._shm.begin_round(self._call, self._number)
        total = self.total
        for slot in self._slots[self._segment.epoch & 1]:
            total.add_(slot)
        entry[watch.END] = watch.now()
