"""The paged KV cache: sequences take pages of a common pool as they grow."""

import torch
from torch import Tensor

from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache, LayerShape, Masking
from shardwise.parallel.options import HOST_PAGE

PAGE_SIZE = HOST_PAGE


class PageTables:
    """Which pages belong to which sequence, kept on the host.

    All ranks hold equal pools and take pages in the same order, so tables need no exchange.
    """

    def __init__(self, *, pages: int, slots: int, page_size: int):
        self.pages, self.page_size = pages, page_size
        self.free = list(range(pages))[::-1]
        self._of = [list[int]() for _ in range(slots)]

    def describe(self) -> str:
        return f"{self.pages} pages of {self.page_size} tokens, shared by {len(self._of)} sequences"

    def __getitem__(self, slot: int) -> list[int]:
        """Pages of a sequence, in the order of its tokens."""
        return self._of[slot]

    def reserve(self, slot: int, tokens: int) -> bool:
        """Pages for `tokens` tokens, those it has included; False when too few are left."""
        table = self._of[slot]
        wanted = -(-tokens // self.page_size) - len(table)
        if wanted > len(self.free):
            return False
        table += [self.free.pop() for _ in range(wanted)]
        return True

    def release(self, slot: int) -> None:
        self.free += self._of[slot][::-1]
        self._of[slot] = []

    def rows(self, slot: int, start: int, stop: int) -> Tensor:
        """int64 [stop - start]: rows of the pool that hold tokens `start` to `stop` of a sequence."""
        tokens = torch.arange(start, stop)
        return torch.tensor(self._of[slot])[tokens // self.page_size] * self.page_size + tokens % self.page_size


class PagedCache(KvCache):
    """`pages` pages of `page_size` tokens, [pages * page_size, Nkv * (D + Dv)] a layer.

    A step gathers the rows of its sequences once a layer and attends to them with the operator for contiguous caches.
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
        self.tables = PageTables(pages=pages, slots=slots, page_size=page_size)
        self.max_length = min(max_length, pages * page_size)
        self._widths = [(s.kv_heads * s.head_dim, s.kv_heads * s.v_head_dim) for s in layers]
        self._heads = [s.kv_heads for s in layers]
        rows = pages * page_size
        self._layers = [torch.empty(rows, sum(widths), dtype=dtype, device=device) for widths in self._widths]
        self._step: tuple[Batch, _Step] | None = None

    def reserve(self, slot: int, tokens: int) -> bool:
        return self.tables.reserve(slot, tokens)

    def release(self, slot: int) -> None:
        self.tables.release(slot)

    def attend(self, layer: int, q: Tensor, kv: Tensor, batch: Batch, masking: Masking) -> Tensor:
        step = self._rows_of(batch)
        pool, heads = self._layers[layer], self._heads[layer]
        pool.index_copy_(0, step.new, kv)
        gathered = pool[step.past]  # [sequences, longest, Nkv * (D + Dv)]
        keys, values = (part.unflatten(-1, (heads, -1)) for part in gathered.split_with_sizes(self._widths[layer], -1))
        k, v = kv.split_with_sizes(self._widths[layer], 1)
        out = torch_cached_attention_with_cache(
            q[None],
            k[None],
            v[None],
            batch.batch_info,
            batch.seq_len,
            batch.input_pos,
            step.order,
            batch.cu_seqlen,
            keys,
            values,
            masking.scale,
            masking.sinks,
            masking.window,
            masking.softcap,
        )
        return out[0]

    def nbytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in self._layers)

    def _rows_of(self, batch: Batch) -> "_Step":
        """Pool rows of a batch, found once for all layers."""
        if self._step is None or self._step[0] is not batch:
            self._step = (batch, _Step(batch, self.tables))
        return self._step[1]


class _Step:
    """Pool rows of one batch.

    new    int64 [T] where the new tokens go
    past   int64 [sequences, longest] rows of each sequence in order; behind a sequence's end any row
    order  int64 [sequences] 0, 1, ...: the gathered rows in place of cache slots
    """

    def __init__(self, batch: Batch, tables: PageTables):
        spans, device = batch.spans, batch.device
        past = torch.zeros(len(spans), max(span.total for span in spans), dtype=torch.int64)
        for number, span in enumerate(spans):
            past[number, : span.total] = tables.rows(span.slot, 0, span.total)
        new = [past[number, span.past : span.total] for number, span in enumerate(spans)]
        self.new, self.past = torch.cat(new).to(device), past.to(device)
        self.order = torch.arange(len(spans), device=device)
