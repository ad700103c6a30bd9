"""Routing on the GPU: the router's product with top-k and softmax, and the weighted sum of the experts' results.

A pair is (token, choice), numbered token * K + choice. Everything is deterministic: the only atomics count arrived
programs.
"""

from shardwise.ops.moe.grouping_kernels import group_few
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
    logit_ptr, id_ptr, weight_ptr, token, tokens, experts,
    SPLITS: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Top-k (lowest id first among equals) and softmax over the k.

    Returns the ids [rows, K_BLOCK], -1 in the padding, and how many of the tokens chose each expert, [E_BLOCK].
    """
    inside = token < tokens
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
    taken = tl.zeros((token.shape[0], E_BLOCK), dtype=tl.int32)
    for choice in tl.static_range(TOP_K):
        best, where = tl.max(logits, axis=1, return_indices=True)
        ids = tl.where((k == choice)[None, :], where[:, None], ids)
        values = tl.where((k == choice)[None, :], best[:, None], values)
        chosen = e[None, :] == where[:, None]
        logits = tl.where(chosen, float("-inf"), logits)
        taken += chosen.to(tl.int32)
    powers = tl.exp(values - tl.max(values, axis=1, keep_dims=True))
    weights = powers / tl.sum(powers, axis=1, keep_dims=True)
    out = token[:, None] * TOP_K + k[None, :]
    kept = inside[:, None] & (k < TOP_K)[None, :]
    tl.store(id_ptr + out, ids, mask=kept)
    tl.store(weight_ptr + out, weights, mask=kept)
    return tl.where(kept, ids, -1), tl.sum(tl.where(inside[:, None], taken, 0), axis=0)


@triton.jit
def _turned(column):
    """Where the kernels for few tokens read a column of a token, in Triton: see `mxfp4_pieces`."""
    return column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2


@triton.jit
def turn_kernel(x_ptr, out_ptr, columns, width, PDL: tl.constexpr):
    """Turned rows [T, width] of x [T, columns], zeros behind the last column."""
    await_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
    tl.store(out_ptr + row * width + _turned(column), x, mask=column < width)


@triton.jit
def _turn(x_ptr, turned_ptr, tokens, columns, width, BT: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr):
    """Turned rows of a token block, one k split of them."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = (token < tokens)[:, None]
    per_split = tl.cdiv(tl.cdiv(columns, BK), SPLITS) * BK
    for start in tl.range(0, per_split, BK):
        k = tl.program_id(2) * per_split + start + tl.arange(0, BK)
        x = tl.load(x_ptr + token[:, None] * columns + k[None, :], mask=inside & (k < columns)[None, :], other=0.0)
        tl.store(turned_ptr + token[:, None] * width + _turned(k)[None, :], x, mask=inside & (k < width)[None, :])


@triton.jit
def _route(
    x_ptr, w_ptr, bias_ptr, logit_ptr, id_ptr, weight_ptr, sorted_ptr, block_ptr, count_ptr, counter_ptr, tokens,
    columns, experts, first, local, programs,
    BT: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """What one of a token block's `programs` does for `route_kernel`."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    split = tl.program_id(2)
    inside, real = token < tokens, expert < experts
    per_split = tl.cdiv(tl.cdiv(columns, BK), SPLITS) * BK
    column = split * per_split + tl.arange(0, BK)
    acc = tl.zeros((BE, BT), dtype=tl.float32)
    for start in tl.range(0, per_split, BK, num_stages=STAGES):
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
    if _arrived_last(counter_ptr + tl.program_id(0), programs):
        row = tl.program_id(0) * BT + tl.arange(0, ROWS)
        ids, counts = _select(
            logit_ptr, id_ptr, weight_ptr, row, tokens, experts, SPLITS, E_BLOCK, TOP_K, K_BLOCK
        )  # fmt: skip
        if GROUP:
            slot = tl.arange(0, ROWS * K_BLOCK)
            group_few(
                tl.reshape(ids, (ROWS * K_BLOCK,)), slot // K_BLOCK * TOP_K + slot % K_BLOCK, sorted_ptr, block_ptr,
                first, local, ROWS * K_BLOCK, BLOCK,
            )  # fmt: skip
        else:
            e = tl.arange(0, E_BLOCK)
            tl.store(count_ptr + tl.program_id(0) * experts + e, counts, mask=e < experts)


@triton.jit(do_not_specialize=["tokens", "first", "local"])
def route_kernel(
    x_ptr, w_ptr, bias_ptr, turned_ptr, logit_ptr, id_ptr, weight_ptr, sorted_ptr, block_ptr, count_ptr, counter_ptr,
    tokens, columns, width, experts, first, local,
    BT: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial logits of BT tokens x BE experts x one k split; the last program of a token block selects its experts.

    ROWS    tokens of a block that there can be: BT, or fewer where there is one block
    GROUP   there is one token block, and its last program groups the pairs as well. Otherwise each block's last
            program stores how many of its tokens chose each expert, count_ptr int32 [token blocks, experts]
    TURN    turned_ptr [tokens, width] becomes the tokens as `mxfp4_few` reads them, zeros behind the last column, by
            programs of their own, the last of dimension 1: as a part of the others' loops it took 5 us
    """
    await_predecessor(PDL)
    others = tl.num_programs(1) - 1 if TURN else tl.num_programs(1)
    if TURN and tl.program_id(1) == others:
        _turn(x_ptr, turned_ptr, tokens, columns, width, BT, BK, SPLITS)
    else:
        _route(
            x_ptr, w_ptr, bias_ptr, logit_ptr, id_ptr, weight_ptr, sorted_ptr, block_ptr, count_ptr, counter_ptr,
            tokens, columns, experts, first, local, others * SPLITS, BT, ROWS, BE, BK, SPLITS, E_BLOCK, TOP_K, K_BLOCK,
            GROUP, BLOCK, STAGES, INTERPRET,
        )  # fmt: skip


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
            value *= tl.load(weight_ptr + pair, mask=held, other=0.0).to(tl.float32)
        total += value
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)
