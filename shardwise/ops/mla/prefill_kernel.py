"""The kernel of `prefill.py`: many new tokens a sequence, over keys and values expanded from latents."""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.mla.decode_kernels import product
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _attend(
    acc, top, total, q, rotated_q, key_at, rotated_at, value_at, position, begin, stop, scale,
    P: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys [begin, stop) in; without MASKED every query sees all of them, and they are whole blocks."""
    n = tl.arange(0, KEYS)
    key_at += begin.to(tl.int64) * P
    rotated_at += begin.to(tl.int64) * WIDTH
    value_at += begin.to(tl.int64) * DV
    for start in range(begin, stop, KEYS):
        if MASKED:
            there = (start + n < stop)[:, None]
            key = tl.load(key_at, mask=there, other=0.0)
            rotated = tl.load(rotated_at, mask=there, other=0.0)
        else:
            key = tl.load(key_at)
            rotated = tl.load(rotated_at)
        scores = product(q, tl.trans(key), tl.zeros((ROWS, KEYS), tl.float32))
        scores = product(rotated_q, tl.trans(rotated), scores)
        if MASKED:
            scores = tl.where(position[:, None] >= (start + n)[None, :], scores, float("-inf"))
        risen = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - risen[:, None])
        decay = tl.exp2(top - risen)
        total = total * decay + tl.sum(p, 1)
        if MASKED:
            value = tl.load(value_at, mask=there, other=0.0)
        else:
            value = tl.load(value_at)
        acc = product(p.to(value.dtype), value, acc * decay[:, None])
        top = risen
        key_at += KEYS * P
        rotated_at += KEYS * WIDTH
        value_at += KEYS * DV
    return acc, top, total


@triton.jit(do_not_specialize=["scale", "keys"])
def prefill_kernel(
    q_ptr,  # [T, heads, P + R], strided tokens
    key_ptr,  # [heads, S, P]
    latent_ptr,  # [S, C + R]
    value_ptr,  # [heads, S, DV]
    out_ptr,  # [T, all heads, DV], from the first of these heads
    tile_ptr,  # int32 [tiles, 4]: first query, queries, first key of its sequence, keys before the first query
    scale,  # times log2(e)
    keys,  # S
    q_stride,
    out_stride,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of queries of one head. Every query sees a key, the first one of its sequence at least."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    tile = tile_ptr + tl.program_id(0) // HEADS * 4
    await_predecessor(PDL)
    first = tl.load(tile)
    count = tl.load(tile + 1)
    base = tl.load(tile + 2).to(tl.int64)
    past = tl.load(tile + 3)
    m = tl.arange(0, ROWS)
    n = tl.arange(0, KEYS)[:, None]
    p = tl.arange(0, P)[None, :]
    r = tl.arange(0, R)[None, :]
    d = tl.arange(0, DV)[None, :]
    live = (m < count)[:, None]
    q_at = q_ptr + (first + m).to(tl.int64)[:, None] * q_stride + head * (P + R)
    q = tl.load(q_at + p, mask=live, other=0.0)
    rotated_q = tl.load(q_at + P + r, mask=live, other=0.0)
    key_at = key_ptr + (head * keys + base + n) * P + p
    rotated_at = latent_ptr + (base + n) * (C + R) + C + r
    value_at = value_ptr + (head * keys + base + n) * DV + d
    position = past + m
    stop = past + count
    middle = (past + 1) // KEYS * KEYS  # keys before it are seen by all queries
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV), tl.float32)
    acc, top, total = _attend(
        acc, top, total, q, rotated_q, key_at, rotated_at, value_at, position, stop * 0, middle, scale,
        P, C + R, DV, ROWS, KEYS, False,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, rotated_q, key_at, rotated_at, value_at, position, middle, stop, scale,
        P, C + R, DV, ROWS, KEYS, True,
    )  # fmt: skip
    out = acc / total[:, None]
    out_at = out_ptr + (first + m).to(tl.int64)[:, None] * out_stride + head * DV + d
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=live)
