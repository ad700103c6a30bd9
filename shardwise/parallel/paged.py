"""The paged KV cache: sequences take pages of a common pool as they grow."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import KvCache, LayerShape, Masking
from shardwise.parallel.options import HOST_PAGE
from shardwise.parallel.single_tokens import even_groups
from shardwise.parallel.states import StateCache

PAGE_SIZE = HOST_PAGE


def ring_pages(window: int | None, page_size: int) -> int | None:
    """Pages that a sequence takes at most in layers with a window; None: as many as its tokens need."""
    return None if window is None else -(-window // page_size)


def pool_pages(window: int | None, *, pages: int, slots: int, page_size: int) -> int:
    """Pages of a layer's pool, in a cache that holds `pages` pages of tokens of up to `slots` sequences."""
    ring = ring_pages(window, page_size)
    return pages if ring is None else min(pages, slots * ring)


class PageTable:
    """Which pages belong to which sequence in the pools of layers with one window (None: they keep every token).

    A window's pages are a ring: a token takes the place of the one that is their size before it, which no later token
    sees. All ranks hold equal pools and take pages in the same order, so tables need no exchange.
    """

    def __init__(self, window: int | None, *, pages: int, slots: int, page_size: int):
        self.window, self.page_size = window, page_size
        self.pages = pool_pages(window, pages=pages, slots=slots, page_size=page_size)
        self.free = list(range(self.pages))[::-1]
        self._most = ring_pages(window, page_size) or self.pages
        self._of = [list[int]() for _ in range(slots)]

    def reserve(self, slot: int, tokens: int) -> bool:
        """Pages for `tokens` tokens, those it has included; False when too few are left."""
        table = self._of[slot]
        wanted = min(-(-tokens // self.page_size), self._most) - len(table)
        if wanted > len(self.free):
            return False
        table += [self.free.pop() for _ in range(wanted)]
        return True

    def release(self, slot: int) -> None:
        self.free += self._of[slot][::-1]
        self._of[slot] = []

    def page(self, slot: int, token: int) -> int:
        """The page of a sequence's token."""
        return self._of[slot][token // self.page_size % self._most]

    def entries(self, span: Span) -> Tensor:
        """int32: the page of each `page_size` tokens of the span's sequence."""
        pages = torch.tensor(self._of[span.slot], dtype=torch.int32)
        return pages[torch.arange(-(-span.total // self.page_size)) % self._most]

    def seen(self, span: Span) -> Span:
        """The span as these layers see it: earlier tokens beyond the window of its first new one do not count."""
        return span if self.window is None else replace(span, past=min(span.past, self.window - 1))

    def rows(self, span: Span) -> Tensor:
        """int64: rows of the pool that hold, or are to hold, the tokens of `seen(span)`, in their order."""
        return self._rows(span.slot, span.total - self.seen(span).total, span.total)

    def kept(self, spans: Sequence[Span]) -> Tensor | None:
        """int64: which of the spans' new tokens a later one may see; None: all of them."""
        if all(self._stays(span) == span.length for span in spans):
            return None
        ends = accumulate(span.length for span in spans)
        return torch.cat([torch.arange(end - self._stays(s), end) for end, s in zip(ends, spans, strict=True)])

    def new(self, spans: Sequence[Span]) -> Tensor:
        """int64: rows of the pool for those."""
        return torch.cat([self._rows(s.slot, s.total - self._stays(s), s.total) for s in spans])

    def _stays(self, span: Span) -> int:
        return span.length if self.window is None else min(span.length, self.window)

    def _rows(self, slot: int, start: int, stop: int) -> Tensor:
        tokens = torch.arange(start, stop)
        pages = torch.tensor(self._of[slot])[tokens // self.page_size % self._most]
        return pages * self.page_size + tokens % self.page_size


class PageTables:
    """The page tables of a cache with `pages` pages of tokens: `of[window]` for each window of its layers.

    `of[None]`, which counts every token, is always there and comes first: where it has free pages, so have the others,
    as a sequence takes no more pages of them, nor more than their rings, which all fit.
    """

    def __init__(self, layers: Sequence[LayerShape], *, pages: int, slots: int, page_size: int):
        windows = sorted({shape.window for shape in layers if shape.window is not None})
        self.slots = slots
        self.of = {w: PageTable(w, pages=pages, slots=slots, page_size=page_size) for w in (None, *windows)}

    def reserve(self, slot: int, tokens: int) -> bool:
        return all(table.reserve(slot, tokens) for table in self.of.values())

    def release(self, slot: int) -> None:
        for table in self.of.values():
            table.release(slot)

    def describe(self) -> str:
        whole, *rest = self.of.values()
        windows = "".join(f", {table.pages} where layers keep the last {table.window}" for table in rest)
        return f"{whole.pages} pages of {whole.page_size} tokens{windows}, shared by {self.slots} sequences"


class PagedCache(KvCache):
    """Pages of `page_size` tokens, [rows, width] a layer: `pages` of them, fewer where windows need fewer.

    A step gathers the rows of its sequences, those of about one length together, once a layer and attends to them with
    the operator for contiguous caches.
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
        page_size: int = PAGE_SIZE,
    ):
        self.slots = slots
        self.tables = PageTables(layers, pages=pages, slots=slots, page_size=page_size)
        self.max_length = min(max_length, pages * page_size)
        self._shapes = layers
        self._layers = [
            torch.empty(self.tables.of[s.window].pages * page_size, s.width, dtype=dtype, device=device) for s in layers
        ]
        states = [shape.state for shape in layers]
        self.states = StateCache(states, slots=slots, dtype=dtype, device=device, kernels=False)
        self._step: tuple[Batch, dict[int | None, _Step]] | None = None

    def reserve(self, slot: int, tokens: int) -> bool:
        return self.tables.reserve(slot, tokens)

    def release(self, slot: int) -> None:
        self.tables.release(slot)
        self.states.clear(slot)

    def attend(self, layer: int, q: Tensor, kv: Tensor, batch: Batch, masking: Masking) -> Tensor:
        shape, pool = self._shapes[layer], self._layers[layer]
        step = self._rows_of(batch)[shape.window]
        out = q.new_empty(*q.shape[:2], shape.v_head_dim)
        for part in step.parts:
            out[part.tokens] = part.attend(q, kv, pool, shape, masking)
        pool.index_copy_(0, step.new, kv if step.kept is None else kv[step.kept])
        return out

    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._layers) + self.states.nbytes()

    def _rows_of(self, batch: Batch) -> "dict[int | None, _Step]":
        """Pool rows of a batch, found once for all layers."""
        if self._step is None or self._step[0] is not batch:
            self._step = (batch, {window: _Step(batch, table) for window, table in self.tables.of.items()})
        return self._step[1]


class _Step:
    """Pool rows of one batch in layers with one window.

    new    int64: where new tokens go
    kept   int64: which of them; None: all
    """

    def __init__(self, batch: Batch, table: PageTable):
        kept = table.kept(batch.spans)
        self.new, self.kept = table.new(batch.spans).to(batch.device), None if kept is None else kept.to(batch.device)
        ends = list(accumulate(span.length for span in batch.spans))
        placed = [(span, range(end - span.length, end)) for span, end in zip(batch.spans, ends, strict=True)]
        longer, singles = placed[: batch.prefills], placed[batch.prefills :]

        def seen(each: _Placed) -> int:
            return table.seen(each[0]).total

        groups = [[each] for each in longer] + even_groups(sorted(singles, key=seen), seen)
        self.parts = [_Part(group, table, batch.device) for group in groups]


_Placed = tuple[Span, range]
"""A span, and its tokens' places in the batch."""


class _Part:
    """Sequences of a batch that are attended to in one call.

    tokens  int64: their tokens' places in the batch
    rows    int64 [sequences, longest] of the pool: tokens that each sequence sees, in order; then any row
    past    int32 [sequences]: how many of them are there already
    order   int64 [sequences] 0, 1, ...: the gathered rows in place of cache slots
    """

    def __init__(self, placed: "Sequence[_Placed]", table: PageTable, device: torch.device):
        spans = [span for span, _ in placed]
        self.tokens = torch.tensor([place for _, places in placed for place in places], device=device)
        self.batch = Batch(spans, [0] * len(self.tokens), device)
        found = [table.rows(span) for span in spans]
        self.rows = torch.nn.utils.rnn.pad_sequence(found, batch_first=True).to(device)
        self.past = torch.tensor([table.seen(span).past for span in spans], dtype=torch.int32, device=device)
        self.order = torch.arange(len(spans), device=device)

    def attend(self, q: Tensor, kv: Tensor, pool: Tensor, shape: LayerShape, masking: Masking) -> Tensor:
        """The batch's q [T, N, D] and kv [T, width] -> [tokens of this part, N, Dv]."""
        keys, values = shape.split(pool[self.rows])  # of [sequences, longest, width]
        k, v = shape.split(kv[self.tokens])
        return torch_cached_attention_with_cache(
            q[self.tokens][None],
            k[None],
            v[None],
            self.batch.batch_info,
            self.batch.seq_len,
            self.past,
            self.order,
            self.batch.cu_seqlen,
            keys,
            values,
            masking.scale,
            masking.sinks,
            masking.window,
            masking.softcap,
        )[0]
