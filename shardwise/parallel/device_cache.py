"""The KV cache of a GPU: pages of a common pool, with page tables that the decode kernels read on the device."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from shardwise.ops.attention.decode import DecodeWorkspace, fused_decode_attention, splits_for, takes_head_size
from shardwise.ops.triton_support import multiprocessors
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import KvCache, LayerShape, Masking
from shardwise.parallel.options import DEVICE_PAGE
from shardwise.parallel.paged import PageTables
from shardwise.parallel.prefill import Choice, PrefillAttention, PrefillStep, choose
from shardwise.parallel.transfer import to_device

PAGE_SIZE = DEVICE_PAGE


class DeviceCache(KvCache):
    """[pages, PAGE_SIZE, Nkv * (D + Dv)] a layer: each token's keys, then its values.

    Sequences with several new tokens are attended to by a prefill backend, over a copy of their pages, whose bytes are
    few beside the products of so many tokens; those with one new token read their pages in place.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        pages: int,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        attention: str = "auto",
    ):
        self.slots, self.dtype, self.device = slots, dtype, device
        self.tables = PageTables(pages=pages, slots=slots, page_size=PAGE_SIZE)
        self.max_length = min(-(-max_length // PAGE_SIZE), pages) * PAGE_SIZE
        self.table = torch.zeros(slots, self.max_length // PAGE_SIZE, dtype=torch.int32, device=device)
        """Page numbers of each slot's sequence."""
        self.layers = layers
        self._pools = [
            torch.empty(pages, PAGE_SIZE, s.kv_heads * (s.head_dim + s.v_head_dim), dtype=dtype, device=device)
            for s in layers
        ]
        self.attention, self._prefill = attention, PrefillAttention(device)
        self._choices: dict[tuple, Choice] = {}
        self._step: tuple[Batch, _Step] | None = None
        self._workspaces: dict[tuple[int, int, int], DecodeWorkspace] = {}
        self._processors = multiprocessors(device)

    def reserve(self, slot: int, tokens: int) -> bool:
        return tokens <= self.max_length and self.tables.reserve(slot, tokens)

    def release(self, slot: int) -> None:
        self.tables.release(slot)

    def page_of(self, span: Span) -> int:
        """The page that holds the first new token of a sequence."""
        return self.tables[span.slot][span.past // PAGE_SIZE]

    def nbytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in self._pools)

    def describe_attention(self) -> str:
        """Which prefill backends have served, and why."""
        found = dict.fromkeys(f"{choice.name} ({choice.reason})" for choice in self._choices.values())
        return ", ".join(found) or "none yet"

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [pages, PAGE_SIZE, Nkv, D] and values [.., Dv], views."""
        shape = self.layers[layer]
        widths = (shape.kv_heads * shape.head_dim, shape.kv_heads * shape.v_head_dim)
        keys, values = self._pools[layer].split_with_sizes(widths, -1)
        return keys.unflatten(-1, (shape.kv_heads, -1)), values.unflatten(-1, (shape.kv_heads, -1))

    def workspace(self, heads: int, kv_heads: int, head_dim: int) -> DecodeWorkspace:
        """What decode attention of such layers keeps between calls; a step's layers run one behind the other."""
        key = (heads, kv_heads, head_dim)
        if key not in self._workspaces:
            runs = max(batch * self.splits(kv_heads, None, batch) for batch in range(1, self.slots + 1))
            self._workspaces[key] = DecodeWorkspace.create(runs, *key, 1, self.device)
        return self._workspaces[key]

    def splits(self, kv_heads: int, window: int | None, batch: int) -> int:
        """Runs that the keys of each of `batch` sequences are cut into."""
        return splits_for(batch, kv_heads, min(self.max_length, window or self.max_length), self._processors)

    def attend(self, layer: int, q: Tensor, kv: Tensor, batch: Batch, masking: Masking) -> Tensor:
        step, shape = self.place(batch), self.layers[layer]
        rows = self._pools[layer].view(-1, kv.shape[1])
        rows.index_copy_(0, step.new, kv)
        if masking.softcap or not _has_decode_kernel(shape):
            return self._attend_part(step.whole, rows, q, kv, shape, masking)
        if not step.singles:
            return self._attend_part(step.longer, rows, q, kv, shape, masking)
        out = q.new_empty(q.shape[0], q.shape[1], shape.v_head_dim)
        count = q.shape[0] - step.singles
        if count:
            out[:count] = self._attend_part(step.longer, rows, q[:count], kv[:count], shape, masking)
        self._attend_singles(out[count:], layer, q[count:], kv[count:], step, masking)
        return out

    def _attend_part(
        self, part: "_Part", rows: Tensor, q: Tensor, kv: Tensor, shape: LayerShape, masking: Masking
    ) -> Tensor:
        """Spans of any length, over a copy of what the pool holds of them."""
        step, choice = part.step, self.choice(shape, masking)
        known = rows.new_empty(part.tokens + step.longest, rows.shape[1])
        if step.continues or choice.name == "flashinfer":
            torch.index_select(rows, 0, part.rows, out=known[: part.tokens])
        return self._prefill(choice, q, kv, known, step, shape, masking)

    def choice(self, shape: LayerShape, masking: Masking) -> Choice:
        """Which prefill backend serves such a layer, and why."""
        key = (shape, masking.window, masking.softcap, masking.sinks is None)
        if key not in self._choices:
            self._choices[key] = choose(self.attention, shape, masking, self.dtype)
        return self._choices[key]

    def _attend_singles(self, out: Tensor, layer: int, q: Tensor, kv: Tensor, step: "_Step", masking: Masking) -> None:
        """One new token a sequence, whose heads are normed and rotated already."""
        (count, heads, size), kv_heads = q.shape, self.layers[layer].kv_heads
        fused_decode_attention(
            torch.cat((q.flatten(1), kv), 1),
            *self.pages(layer),
            self.table,
            step.positions,
            None,
            self.workspace(heads, kv_heads, size),
            heads=heads,
            slots=step.slots,
            splits=self.splits(kv_heads, masking.window, count),
            scale=masking.scale,
            sinks=masking.sinks,
            window=masking.window,
            out=out.view(count, -1),
        )

    def place(self, batch: Batch) -> "_Step":
        """A batch's places in the pool, found once for all layers; its pages enter the table."""
        if self._step is None or self._step[0] is not batch:
            self._step = (batch, _Step(batch, self.tables, self.table))
        return self._step[1]


def _has_decode_kernel(shape: LayerShape) -> bool:
    return shape.head_dim == shape.v_head_dim and takes_head_size(shape.head_dim)


class _Part:
    """Spans that a prefill backend serves."""

    def __init__(self, spans: Sequence[Span], tables: PageTables, device: torch.device):
        self.step, self._tables = PrefillStep(spans, device), tables
        self.tokens = sum(span.total for span in spans)

    @cached_property
    def rows(self) -> Tensor:
        """int64 [tokens]: pool rows of all their tokens, the new ones included."""
        rows = [self._tables.rows(span.slot, 0, span.total) for span in self.step.spans]
        return to_device([torch.cat(rows)], self.step.device)[0]


class _Step:
    """One batch's places in the pool.

    new      int64 [T]: rows where the new tokens go
    longer   the spans of several tokens
    singles  number of one-token spans, which stand behind the others
    """

    def __init__(self, batch: Batch, tables: PageTables, table: Tensor):
        self._batch, self._tables = batch, tables
        self.singles = len(batch.spans) - batch.prefills
        lists = [torch.tensor(tables[span.slot], dtype=torch.int32) for span in batch.spans]
        pages = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
        new = torch.cat([tables.rows(s.slot, s.past, s.total) for s in batch.spans])
        self.new, pages = to_device([new, pages], batch.device)
        table[:, : pages.shape[1]].index_copy_(0, batch.slots, pages)

    @cached_property
    def longer(self) -> _Part:
        return _Part(self._batch.spans[: self._batch.prefills], self._tables, self._batch.device)

    @cached_property
    def whole(self) -> _Part:
        return _Part(self._batch.spans, self._tables, self._batch.device)

    @cached_property
    def positions(self) -> Tensor:
        return self._batch.input_pos[self._batch.prefills :]

    @cached_property
    def slots(self) -> Tensor:
        return self._batch.slots[self._batch.prefills :].int()
