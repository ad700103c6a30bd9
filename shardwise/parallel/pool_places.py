"""Where the tokens of a batch are in the pools of a GPU's KV cache."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.paged import PageTable, PageTables
from shardwise.parallel.prefill import PrefillStep
from shardwise.parallel.transfer import to_device


class Part:
    """Spans that a prefill backend serves, in layers with one window."""

    def __init__(self, spans: Sequence[Span], table: PageTable, device: torch.device):
        self._spans, self._table = spans, table
        self.step = PrefillStep([table.seen(span) for span in spans], device)
        self.tokens = sum(span.total for span in self.step.spans)

    @cached_property
    def rows(self) -> Tensor:
        """int64 [tokens]: pool rows of all tokens that they see, with places for the new ones."""
        return to_device([torch.cat([self._table.rows(span) for span in self._spans])], self.step.device)[0]

    @cached_property
    def new(self) -> Tensor:
        """int64 [T]: which of `rows` are new tokens."""
        ends = accumulate(span.total for span in self.step.spans)
        places = [torch.arange(end - s.length, end) for end, s in zip(ends, self.step.spans, strict=True)]
        return to_device([torch.cat(places)], self.step.device)[0]


class Places:
    """One batch's places in the pools of layers with one window.

    new     int64: rows where new tokens go
    kept    int64: which of them; None: all
    longer  the spans of several tokens
    """

    def __init__(self, batch: Batch, table: PageTable, new: Tensor, kept: Tensor | None):
        self._batch, self._table = batch, table
        self.new, self.kept = new, kept

    @cached_property
    def longer(self) -> Part:
        return Part(self._batch.spans[: self._batch.prefills], self._table, self._batch.device)

    @cached_property
    def whole(self) -> Part:
        return Part(self._batch.spans, self._table, self._batch.device)


class StepPlaces:
    """One batch's places in the pools, for each window.

    singles  number of one-token spans, which come after the others
    """

    def __init__(self, batch: Batch, tables: PageTables, page_tables: Tensor):
        self._batch = batch
        self.singles = len(batch.spans) - batch.prefills
        spans, pad = batch.spans, torch.nn.utils.rnn.pad_sequence
        found = [
            (pad([table.entries(span) for span in spans], batch_first=True), table.new(spans), table.kept(spans))
            for table in tables.of.values()
        ]
        moved = iter(to_device([tensor for row in found for tensor in row if tensor is not None], batch.device))
        self.places: dict[int | None, Places] = {}
        for (window, table), entered, (_, _, kept) in zip(tables.of.items(), page_tables, found, strict=True):
            pages = next(moved)
            entered[:, : pages.shape[1]].index_copy_(0, batch.slots, pages)
            self.places[window] = Places(batch, table, next(moved), None if kept is None else next(moved))

    @cached_property
    def positions(self) -> Tensor:
        return self._batch.input_pos[self._batch.prefills :]

    @cached_property
    def slots(self) -> Tensor:
        return self._batch.slots[self._batch.prefills :].int()
