"""The two ends of a decode step on a GPU: tokens to rows of the embedding, logits to the greedy token.

Not registered operators: the runtime's fused decode step calls them directly, inside its CUDA graph, so that a chain of
greedy steps never waits for the host.
"""

import torch
from torch import Tensor

from shardwise.ops.triton_support import interpreting, tl, triton

TOKEN, SOURCE, POSITION, SLOT, PAGE = range(5)
"""Rows of a step's input, int32 [4 + page tables, B].

TOKEN     the token, where the host knows it
SOURCE    else the place of the token among the last step's results; negative: the host knows it
POSITION  tokens of the sequence that the cache holds; negative: the row is padding
SLOT      the sequence's row of the page table
PAGE      from here on, for each page table: the page that holds POSITION
"""
MOST_TOKENS = 1 << 24
"""A vocabulary whose numbers float32, in which they travel, holds."""


@triton.jit
def embed_kernel(
    input_ptr,  # int32 [4 + TABLES, B]
    last_ptr,  # int32 [most B], the last step's tokens
    table_ptr,  # int32 [TABLES, slots, max_pages]
    weight_ptr,  # [local vocabulary, H]
    out_ptr,  # [B, H]
    batch,
    slots,
    max_pages,
    first,
    count,
    columns,
    multiplier,
    PAGE_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    token = tl.load(input_ptr + row)
    source = tl.load(input_ptr + batch + row)
    if source >= 0:
        token = tl.load(last_ptr + source)
    position = tl.load(input_ptr + 2 * batch + row)
    if (tl.program_id(1) == 0) & (position >= 0):
        slot = tl.load(input_ptr + 3 * batch + row)
        for table in tl.static_range(TABLES):
            page = tl.load(input_ptr + (4 + table) * batch + row)
            tl.store(table_ptr + (table * slots + slot) * max_pages + position // PAGE_SIZE, page)
    local = token - first
    held = (local >= 0) & (local < count)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = weight_ptr + local.to(tl.int64) * columns + column
    values = tl.load(at, mask=inside & held, other=0.0).to(tl.float32) * multiplier
    tl.store(out_ptr + row.to(tl.int64) * columns + column, values.to(out_ptr.dtype.element_ty), mask=inside)


def embed(
    inputs: Tensor,  # int32 [4 + tables, B], see TOKEN and the others
    last: Tensor,  # int32 [most B]
    tables: Tensor,  # int32 [tables, slots, max_pages]
    weight: Tensor,  # [local vocabulary, H]
    *,
    first: int,
    page_size: int,
    multiplier: float = 1.0,
) -> Tensor:
    """Rows of this rank's part of the embedding, which begins at token `first`; [B, H], zero for others' tokens.

    Also enters each sequence's current pages in the page tables.
    """
    batch, columns = inputs.shape[1], weight.shape[1]
    out = weight.new_empty(batch, columns)
    block = 1024
    embed_kernel[(batch, triton.cdiv(columns, block))](
        inputs, last, tables, weight, out, batch, *tables.shape[1:], first, weight.shape[0], columns, multiplier,
        PAGE_SIZE=page_size, TABLES=tables.shape[0], BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _first_largest(values, indices):
    """The largest value, and the smallest index that has it; where all are NaN an index beyond all others."""
    value = tl.max(values, 0)
    return value, tl.min(tl.where(values == value, indices, 0x7FFFFFFF), 0)


@triton.jit
def best_kernel(
    logit_ptr,  # [B, columns]
    value_ptr,  # float32 [B, parts]
    index_ptr,  # int32 [B, parts]
    counter_ptr,  # int32 [B], zero between calls
    token_ptr,  # int32 [B]
    pair_ptr,  # float32 [B, 2]
    columns,
    limit,
    first,
    parts,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1)
    part = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    column = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logit_ptr + row.to(tl.int64) * columns + column, mask=column < limit, other=float("-inf"))
    value, index = _first_largest(values.to(tl.float32), column)
    tl.store(value_ptr + row * parts + part, value)
    tl.store(index_ptr + row * parts + part, index)
    tl.debug_barrier()  # this program's stores come before its arrival
    if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu") != parts - 1:
        return
    tl.store(counter_ptr + row, 0)
    other = tl.arange(0, PARTS)
    values = tl.load(value_ptr + row * parts + other, mask=other < parts, other=float("-inf"), cache_modifier=".cg")
    indices = tl.load(index_ptr + row * parts + other, mask=other < parts, other=0x7FFFFFFF, cache_modifier=".cg")
    value, index = _first_largest(values, indices)
    index = tl.minimum(index, tl.maximum(limit - 1, 0)) + first
    if PAIRS:
        tl.store(pair_ptr + row * 2, value)
        tl.store(pair_ptr + row * 2 + 1, index.to(tl.float32))
    else:
        tl.store(token_ptr + row, index)


@triton.jit
def winner_kernel(
    pair_ptr,  # float32 [ranks, B, 2]
    token_ptr,  # int32 [B]
    batch,
    ranks,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0)
    rank = tl.arange(0, RANKS)
    at = pair_ptr + (rank * batch + row) * 2
    values = tl.load(at, mask=rank < ranks, other=float("-inf"))
    tokens = tl.load(at + 1, mask=rank < ranks, other=0.0).to(tl.int32)
    _, token = _first_largest(values, tl.where(rank < ranks, tokens, 0x7FFFFFFF))
    tl.store(token_ptr + row, token)


BEST_BLOCK = 2048


class GreedyChoice:
    """Finds the most likely token of each row, the first among equals; over all ranks of a group in one small sum.

    Of a row that has no number at all, NaN in every column, the last token.
    """

    def __init__(self, *, most: int, columns: int, first: int, limit: int, rank: int, ranks: int, device: torch.device):
        """For up to `most` rows of `columns` logits, of which the first `limit` are tokens, from `first` on."""
        self.columns, self.first, self.limit, self.rank, self.ranks = columns, first, limit, rank, ranks
        self._parts = triton.cdiv(columns, BEST_BLOCK)
        self._values = torch.empty(most, self._parts, device=device)
        self._indices = torch.empty(most, self._parts, dtype=torch.int32, device=device)
        self._counters = torch.zeros(most, dtype=torch.int32, device=device)

    def local(self, logits: Tensor, tokens: Tensor, *, pdl: bool = False) -> Tensor:
        """logits [B, columns] -> `tokens` int32 [B] where there is one rank.

        Else what the group must sum, float32 [ranks, B, 2], for `winner`: pairs (logit, token) of this rank, and zeros
        in the others' places.
        """
        batch, several = logits.shape[0], self.ranks > 1
        pairs = torch.zeros(self.ranks, batch, 2, device=logits.device) if several else self._values
        pdl = pdl and not interpreting()
        best_kernel[(self._parts, batch)](
            logits, self._values, self._indices, self._counters, tokens, pairs[self.rank] if several else pairs,
            self.columns, self.limit, self.first, self._parts,
            BLOCK=BEST_BLOCK, PARTS=triton.next_power_of_2(self._parts), PAIRS=several, PDL=pdl, num_warps=8,
            launch_pdl=pdl,
        )  # fmt: skip
        return pairs

    def winner(self, pairs: Tensor, tokens: Tensor) -> None:
        """pairs float32 [ranks, B, 2], summed over the group -> `tokens` int32 [B]."""
        winner_kernel[(pairs.shape[1],)](
            pairs, tokens, pairs.shape[1], self.ranks, RANKS=triton.next_power_of_2(self.ranks), num_warps=1
        )
