"""Routing on the GPU: router product with top-k and softmax, grouping of pairs by expert, and the weighted sum.

A pair is (token, choice), numbered token * K + choice. Grouping gives the pairs in the order (expert, pair) and a
table of blocks, int32 [1 + 3 * blocks]: their number, then (expert, first, end) in sorted positions. Everything is
deterministic: the only atomics count arrived programs.
"""

from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _arrived_last(counter_ptr, parts):
    """Count this program in; True in the last of `parts`, which sees all their stores and resets the counter."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _select(
    logit_ptr, id_ptr, weight_ptr, token, inside, tokens, experts,
    SPLITS: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Top-k (lowest id first among equals) and softmax over the k; returns the ids [BT, K_BLOCK], -1 in the padding."""
    e = tl.arange(0, E_BLOCK)
    k = tl.arange(0, K_BLOCK)
    mask = inside[:, None] & (e < experts)[None, :]
    logits = tl.zeros((token.shape[0], E_BLOCK), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = logit_ptr + (split * tokens + token)[:, None] * experts + e[None, :]
        logits += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    logits = tl.where((e < experts)[None, :], logits, float("-inf"))
    ids = tl.full((token.shape[0], K_BLOCK), -1, dtype=tl.int32)
    values = tl.full((token.shape[0], K_BLOCK), float("-inf"), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        best, where = tl.max(logits, axis=1, return_indices=True)
        ids = tl.where((k == choice)[None, :], where[:, None], ids)
        values = tl.where((k == choice)[None, :], best[:, None], values)
        logits = tl.where(e[None, :] == where[:, None], float("-inf"), logits)
    powers = tl.exp(values - tl.max(values, axis=1, keep_dims=True))
    weights = powers / tl.sum(powers, axis=1, keep_dims=True)
    out = token[:, None] * TOP_K + k[None, :]
    kept = inside[:, None] & (k < TOP_K)[None, :]
    tl.store(id_ptr + out, ids, mask=kept)
    tl.store(weight_ptr + out, weights, mask=kept)
    return tl.where(kept, ids, -1)


@triton.jit
def _group_few(
    ids, sorted_ptr, block_ptr, first, local, TOP_K: tl.constexpr, BT: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Group the pairs of `ids` [BT, K_BLOCK] by comparing all with all."""
    COUNT: tl.constexpr = BT * K_BLOCK
    slot = tl.arange(0, COUNT)
    expert = tl.reshape(ids, (COUNT,)) - first
    valid = (tl.reshape(ids, (COUNT,)) >= 0) & (expert >= 0) & (expert < local)
    key = tl.where(valid, expert * COUNT + slot, 0x7FFFFFFF)
    # The row vector goes through a reduction of the diagonal, which is how a tile is transposed without memory.
    same = slot[:, None] == slot[None, :]
    key_row = tl.sum(tl.where(same, key[:, None], 0), axis=0)
    valid_row = key_row != 0x7FFFFFFF
    before = (key_row[None, :] < key[:, None]) & valid_row[None, :]
    kin = before & (key_row[None, :] // COUNT == expert[:, None])
    position = tl.sum(before.to(tl.int32), axis=1)
    rank = tl.sum(kin.to(tl.int32), axis=1)
    ours = valid_row[None, :] & (key_row[None, :] // COUNT == expert[:, None])
    count = tl.sum(ours.to(tl.int32), axis=1)
    leads = valid & (rank % BLOCK == 0)
    leads_row = tl.sum(tl.where(same, leads.to(tl.int32)[:, None], 0), axis=0)
    block = tl.sum(before.to(tl.int32) * leads_row[None, :], axis=1)
    pair = slot // K_BLOCK * TOP_K + slot % K_BLOCK
    tl.store(sorted_ptr + position, pair, mask=valid)
    tl.store(block_ptr, tl.sum(leads.to(tl.int32), axis=0))
    tl.store(block_ptr + 1 + 3 * block, expert, mask=leads)
    tl.store(block_ptr + 2 + 3 * block, position, mask=leads)
    tl.store(block_ptr + 3 + 3 * block, position + count - rank, mask=leads)


@triton.jit(do_not_specialize=["tokens", "first", "local"])
def route_kernel(
    x_ptr, w_ptr, bias_ptr, logit_ptr, id_ptr, weight_ptr, sorted_ptr, block_ptr, counter_ptr, tokens, columns,
    experts, first, local,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, E_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Partial logits of BT tokens x BE experts x one k split; the last program of a token block selects its experts.

    GROUP: there is one token block, and its last program groups the pairs as well.
    """
    await_predecessor(PDL)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    split = tl.program_id(2)
    inside, real = token < tokens, expert < experts
    per_split = tl.cdiv(tl.cdiv(columns, BK), SPLITS) * BK
    column = split * per_split + tl.arange(0, BK)
    acc = tl.zeros((BE, BT), dtype=tl.float32)
    for start in tl.range(0, per_split, BK, num_stages=4):
        k = column + start
        w = tl.load(
            w_ptr + expert[:, None] * columns + k[None, :], mask=real[:, None] & (k < columns)[None, :], other=0.0
        )
        x = tl.load(
            x_ptr + token[:, None] * columns + k[None, :], mask=inside[:, None] & (k < columns)[None, :], other=0.0
        )
        if INTERPRET:
            acc += tl.dot(w.to(tl.float32), tl.trans(x).to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    bias = tl.load(bias_ptr + expert, mask=real & (split == 0), other=0.0).to(tl.float32)
    acc += bias[:, None]
    at = logit_ptr + (split * tokens + token)[None, :] * experts + expert[:, None]
    tl.store(at, acc, mask=real[:, None] & inside[None, :])
    if _arrived_last(counter_ptr + tl.program_id(0), tl.num_programs(1) * tl.num_programs(2)):
        ids = _select(logit_ptr, id_ptr, weight_ptr, token, inside, tokens, experts, SPLITS, E_BLOCK, TOP_K, K_BLOCK)
        if GROUP:
            _group_few(ids, sorted_ptr, block_ptr, first, local, TOP_K, BT, K_BLOCK, BLOCK)


@triton.jit(do_not_specialize=["pairs", "first", "local"])
def group_kernel(
    id_ptr, sorted_ptr, block_ptr, pairs, first, local, CHUNK: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program an expert: it counts the pairs of all experts, then places its own and writes its blocks."""
    await_predecessor(PDL)
    mine = tl.program_id(0)
    e = tl.arange(0, E_BLOCK)
    slot = tl.arange(0, CHUNK)
    counts = tl.zeros((E_BLOCK,), dtype=tl.int32)
    for start in tl.range(0, pairs, CHUNK):
        expert = tl.load(id_ptr + start + slot, mask=start + slot < pairs, other=-1) - first
        valid = (start + slot < pairs) & (expert >= 0) & (expert < local)
        counts += tl.histogram(tl.where(valid, expert, E_BLOCK - 1).to(tl.int32), E_BLOCK)
    counts = tl.where(e < local, counts, 0)
    blocks = (counts + BLOCK - 1) // BLOCK
    position = tl.sum(tl.where(e < mine, counts, 0), axis=0)
    block = tl.sum(tl.where(e < mine, blocks, 0), axis=0)
    end = position + tl.sum(tl.where(e == mine, counts, 0), axis=0)
    if mine == local - 1:
        tl.store(block_ptr, tl.sum(blocks, axis=0))
    for place in tl.range(position, end, BLOCK):
        at = block_ptr + 1 + 3 * (block + (place - position) // BLOCK)
        tl.store(at, mine)
        tl.store(at + 1, place)
        tl.store(at + 2, end)
    for start in tl.range(0, pairs, CHUNK):
        expert = tl.load(id_ptr + start + slot, mask=start + slot < pairs, other=-1) - first
        hit = ((start + slot < pairs) & (expert == mine)).to(tl.int32)
        rank = tl.cumsum(hit, axis=0)
        tl.store(sorted_ptr + position + rank - 1, (start + slot).to(tl.int32), mask=hit == 1)
        position += tl.sum(hit, axis=0)


@triton.jit(do_not_specialize=["pairs", "first", "local"])
def combine_kernel(
    value_ptr, id_ptr, weight_ptr, out_ptr, pairs, first, local, columns,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over its pairs of weight * sum over splits of value[split, pair], in float32, in order."""
    await_predecessor(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(id_ptr + pair) - first
        held = (expert >= 0) & (expert < local)
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            at = value_ptr + (split * pairs + pair) * columns + column
            value += tl.load(at, mask=inside & held, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_ptr + pair).to(tl.float32)
        total += value
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)
