"""Pairs (token, choice) grouped by expert: their order by (expert, pair), and a table of token blocks.

The table is int32 [1 + 3 * blocks]: the number of blocks, then (expert, first, end) of each in sorted positions, of
which the first BLOCK are the block's own. A counting sort: parts of the pairs are counted, then each part places its
own, so that the result is the same however programs run.
"""

from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def group_few(
    ids, pair, sorted_ptr, block_ptr, first, local, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Group the pairs `pair` [COUNT] with `ids` [COUNT], of which others than the local ones are skipped: all compared
    with all.

    Only rows and columns of the comparison are reduced. Triton 3.6 sums a vector wrongly that came out of a reshape
    with lanes that repeat others between lanes that do not.
    """
    slot = tl.arange(0, COUNT)
    expert = ids - first
    valid = (ids >= 0) & (expert >= 0) & (expert < local)
    key = tl.where(valid, expert * COUNT + slot, 0x7FFFFFFF)
    # A row goes through a reduction of the diagonal, which is how a vector is turned without memory.
    same = slot[:, None] == slot[None, :]
    key_row = tl.sum(tl.where(same, key[:, None], 0), axis=0)
    valid_row = key_row != 0x7FFFFFFF
    ours = valid_row[None, :] & (key_row[None, :] // COUNT == expert[:, None])
    before = valid_row[None, :] & (key_row[None, :] < key[:, None])
    position = tl.sum(before.to(tl.int32), axis=1)
    rank = tl.sum((before & ours).to(tl.int32), axis=1)
    count = tl.sum(ours.to(tl.int32), axis=1)
    leads = valid & (rank % BLOCK == 0)
    leads_row = tl.sum(tl.where(same, leads.to(tl.int32)[:, None], 0), axis=0)
    block = tl.sum(before.to(tl.int32) * leads_row[None, :], axis=1)
    tl.store(sorted_ptr + position, pair, mask=valid)
    tl.store(block_ptr, tl.sum(leads_row, axis=0))
    tl.store(block_ptr + 1 + 3 * block, expert, mask=leads)
    tl.store(block_ptr + 2 + 3 * block, position, mask=leads)
    tl.store(block_ptr + 3 + 3 * block, position + count - rank, mask=leads)


@triton.jit(do_not_specialize=["pairs", "first", "local"])
def group_few_kernel(
    id_ptr, sorted_ptr, block_ptr, pairs, first, local, COUNT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program groups all pairs, at most COUNT."""
    await_predecessor(PDL)
    pair = tl.arange(0, COUNT)
    ids = tl.load(id_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    group_few(ids, pair, sorted_ptr, block_ptr, first, local, COUNT, BLOCK)


@triton.jit
def _choices(id_ptr, pair, inside, first, local):
    """Local experts of pairs, and which of these pairs have one."""
    expert = tl.load(id_ptr + pair, mask=inside, other=-1).to(tl.int32) - first
    return expert, (expert >= 0) & (expert < local)


@triton.jit(do_not_specialize=["pairs", "experts"])
def count_kernel(id_ptr, count_ptr, pairs, experts, PART: tl.constexpr, E_BLOCK: tl.constexpr, PDL: tl.constexpr):
    """How many of a part's PART pairs chose each expert, count_ptr int32 [parts, experts]; other ids are skipped."""
    await_predecessor(PDL)
    e = tl.arange(0, E_BLOCK)
    pair = tl.program_id(0) * PART + tl.arange(0, PART)
    expert, valid = _choices(id_ptr, pair, pair < pairs, 0, experts)
    tl.store(count_ptr + tl.program_id(0) * experts + e, tl.histogram(expert, E_BLOCK, valid), mask=e < experts)


@triton.jit
def _sums(
    id_ptr, count_ptr, pairs, parts, stride, first, local,
    PART: tl.constexpr, E_BLOCK: tl.constexpr, STEP: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """How many pairs chose each local expert, and how many of the parts before this one, [E_BLOCK] each."""
    part = tl.program_id(0)
    if COUNTED:
        e = tl.arange(0, E_BLOCK)
        totals = tl.zeros((STEP, E_BLOCK), dtype=tl.int32)
        before = tl.zeros((STEP, E_BLOCK), dtype=tl.int32)
        for start in tl.range(0, parts, STEP):
            other = start + tl.arange(0, STEP)
            at = count_ptr + other[:, None] * stride + first + e[None, :]
            counts = tl.load(at, mask=(other < parts)[:, None] & (e < local)[None, :], other=0)
            totals += counts
            before += tl.where((other < part)[:, None], counts, 0)
        return tl.sum(totals, axis=0), tl.sum(before, axis=0)
    else:
        totals = tl.zeros((E_BLOCK,), dtype=tl.int32)
        before = tl.zeros((E_BLOCK,), dtype=tl.int32)
        for start in tl.range(0, pairs, STEP):
            pair = start + tl.arange(0, STEP)
            expert, valid = _choices(id_ptr, pair, pair < pairs, first, local)
            totals += tl.histogram(expert, E_BLOCK, valid)
            before += tl.histogram(expert, E_BLOCK, valid & (pair < part * PART))
        return totals, before


@triton.jit
def _base(totals, before, block_ptr, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Sorted position of this part's first pair of each local expert, [E_BLOCK]; writes its share of the blocks."""
    part = tl.program_id(0)
    e = tl.arange(0, E_BLOCK)
    begin = tl.cumsum(totals, axis=0) - totals
    blocks = (totals + BLOCK - 1) // BLOCK
    row = tl.cumsum(blocks, axis=0) - blocks
    if part == 0:
        tl.store(block_ptr, tl.sum(blocks, axis=0))
    for number in tl.range(part, tl.max(blocks, axis=0), tl.num_programs(0)):
        at = block_ptr + 1 + 3 * (row + number)
        has = number < blocks
        tl.store(at, e, mask=has)
        tl.store(at + 1, begin + number * BLOCK, mask=has)
        tl.store(at + 2, begin + totals, mask=has)
    return begin + before


@triton.jit(do_not_specialize=["pairs", "parts", "first", "local"])
def place_kernel(
    id_ptr, count_ptr, sorted_ptr, block_ptr, pairs, parts, stride, first, local,
    PART: tl.constexpr, P_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, STEP: tl.constexpr, COUNTED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a part: it sums the counts of all parts, places its own pairs and writes its share of the blocks.

    count_ptr   int32 [parts, stride], the counts of all experts; the local ones begin at `first`
    PART        pairs of a part, at most P_BLOCK
    COUNTED     otherwise each program counts all pairs by itself
    STEP        parts whose counts are read at once, or pairs that are counted at once
    """
    await_predecessor(PDL)
    totals, before = _sums(id_ptr, count_ptr, pairs, parts, stride, first, local, PART, E_BLOCK, STEP, COUNTED)
    base = _base(totals, before, block_ptr, E_BLOCK, BLOCK)
    RUN: tl.constexpr = min(P_BLOCK, 128)
    slot = tl.arange(0, RUN)
    for start in tl.range(0, P_BLOCK, RUN):
        pair = tl.program_id(0) * PART + start + slot
        inside = (start + slot < PART) & (pair < pairs)
        expert, valid = _choices(id_ptr, pair, inside, first, local)
        others, _ = _choices(id_ptr, pair, inside, first, local)
        kin = (others[None, :] == expert[:, None]) & (slot[None, :] < slot[:, None])
        position = tl.gather(base, tl.where(valid, expert, 0), axis=0) + tl.sum(kin.to(tl.int32), axis=1)
        tl.store(sorted_ptr + position, pair, mask=valid)
        if P_BLOCK > RUN:
            base += tl.histogram(expert, E_BLOCK, valid)
