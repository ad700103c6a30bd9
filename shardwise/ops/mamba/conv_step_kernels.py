"""Triton kernels of the causal convolution's step, one token of every sequence: of any layout, and of dense states."""

from shardwise.ops.mamba.conv_kernels import load_rows, load_taps
from shardwise.ops.metadata_reports import check_slots
from shardwise.ops.ptx import silu
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit(do_not_specialize=["first", "skip", "slots"])
def decode_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    slot_ptr,
    cache_ptr,
    word_ptr,
    first,
    skip,
    slots,
    channels,
    x_t,
    x_c,
    cache_slot,
    cache_c,
    cache_k,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token and a block of its channels, for any strides and K.

    The decode tokens begin at token `first` and their slots at entry `skip`.
    """
    await_predecessor(PDL)
    tiles = tl.cdiv(channels, CHANNELS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    slot = tl.load(slot_ptr + skip + token).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        check_slots(word_ptr, True, skip + token, slot, slots)
        return
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < channels
    row = x_ptr + (first + token) * x_t + c.to(tl.int64) * x_c
    cached = cache_ptr + slot * cache_slot + c.to(tl.int64) * cache_c
    x = tl.load(row, mask=mask, other=0.0)
    past = load_rows(cached, 0, K - 1, cache_k, mask, K - 1)
    taps = load_taps(weight_ptr, c, channels, K)
    out = x.to(tl.float32) * taps[K - 1]
    if BIAS:
        out += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(K - 1):
        out += past[k].to(tl.float32) * taps[k]
    if SILU:
        out = silu(out)
    past = past + (x.to(cache_ptr.dtype.element_ty),)
    for k in tl.static_range(K - 1):
        tl.store(cached + k * cache_k, past[k + 1], mask=mask)
    tl.store(row, out.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def columns(tile):
    """[T, G, 8] -> its eight columns [T, G], which a thread holds already."""
    even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1], 4, 2))
    even0, even1 = tl.split(even.reshape(tile.shape[0], tile.shape[1], 2, 2))
    odd0, odd1 = tl.split(odd.reshape(tile.shape[0], tile.shape[1], 2, 2))
    a0, a4 = tl.split(even0)
    a2, a6 = tl.split(even1)
    a1, a5 = tl.split(odd0)
    a3, a7 = tl.split(odd1)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def tile_of(a, BEGIN: tl.constexpr, STEP: tl.constexpr):
    """Eight columns [T, G] of the tuple `a`, STEP apart, as one tile [T, G, 8]."""
    even = tl.join(
        tl.join(a[BEGIN], a[BEGIN + 4 * STEP]),
        tl.join(a[BEGIN + 2 * STEP], a[BEGIN + 6 * STEP]),
    )
    odd = tl.join(
        tl.join(a[BEGIN + STEP], a[BEGIN + 5 * STEP]),
        tl.join(a[BEGIN + 3 * STEP], a[BEGIN + 7 * STEP]),
    )
    return tl.join(even, odd).reshape(even.shape[0], even.shape[1], 8)


@triton.jit
def quarters(tile):
    """[4, G, T, 8] -> [G, T, 8] for each of the four."""
    parts = tile.reshape(2, 2, tile.shape[1], tile.shape[2], 8).permute(2, 3, 4, 0, 1)
    even, odd = tl.split(parts)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["first", "skip", "tokens", "slots"])
def decode_dense_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    slot_ptr,
    cache_ptr,
    word_ptr,
    first,
    skip,
    tokens,
    slots,
    channels,
    x_t,
    cache_slot,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """K = 4, contiguous channels and states: TOKENS tokens and GROUPS times eight channels.

    The states of eight channels are three tiles of eight numbers, channel by channel. They are moved as whole rows,
    16 bytes a thread, and a thread turns its three tiles into one for each tap by renaming registers. The order of
    the dimensions decides how Triton spreads them over lanes: the first one fastest.
    """
    await_predecessor(PDL)
    tiles = tl.cdiv(channels, GROUPS * 8)
    t = tl.program_id(0) // tiles * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slot_ptr + skip + t, mask=t < tokens, other=-1).to(tl.int64)
    check_slots(word_ptr, t < tokens, skip + t, slot, slots)
    t = first + t.to(tl.int64)
    g, j, e = tl.program_id(0) % tiles * GROUPS + tl.arange(0, GROUPS), tl.arange(0, 4), tl.arange(0, 8)
    live = (slot >= 0) & (slot < slots)
    mask = live[None, :, None] & (g * 8 < channels)[:, None, None]
    c = g[:, None] * 8 + e[None, :]
    row = x_ptr + t[None, :, None] * x_t + c[:, None, :]
    inside = (g[None, :] * 24 + j[:, None] * 8)[:, :, None, None] + e[None, None, None, :]
    cached = cache_ptr + slot[None, None, :, None] * cache_slot + inside
    moved = mask[None, :, :, :] & (j < 3)[:, None, None, None]
    x = tl.load(row, mask=mask, other=0.0)
    tiles = quarters(tl.load(cached, mask=moved, other=0.0))
    k = c[:, :, None] * 4 + j[None, None, :]
    weight = tl.load(weight_ptr + k, mask=(c < channels)[:, :, None], other=0.0).to(tl.float32)
    even, odd = tl.split(weight.reshape(GROUPS, 8, 2, 2))
    tap0, tap2 = tl.split(even)
    tap1, tap3 = tl.split(odd)
    taken = columns(tiles[0]) + columns(tiles[1]) + columns(tiles[2])
    past0, past1, past2 = tile_of(taken, 0, 3), tile_of(taken, 1, 3), tile_of(taken, 2, 3)
    out = x.to(tl.float32) * tap3[:, None, :]
    if BIAS:
        out += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[:, None, :]
    out += past0.to(tl.float32) * tap0[:, None, :]
    out += past1.to(tl.float32) * tap1[:, None, :]
    out += past2.to(tl.float32) * tap2[:, None, :]
    if SILU:
        out = silu(out)
    first, second, third = columns(past1), columns(past2), columns(x.to(cache_ptr.dtype.element_ty))
    given = ()
    for i in tl.static_range(8):
        given = given + (first[i], second[i], third[i])  # type: ignore[assignment]
    tile0, tile1, tile2 = tile_of(given, 0, 1), tile_of(given, 8, 1), tile_of(given, 16, 1)
    new = tl.join(tl.join(tile0, tile2), tl.join(tile1, tile1)).permute(3, 4, 0, 1, 2)
    tl.store(cached, new.reshape(4, GROUPS, TOKENS, 8), mask=moved)
    tl.store(row, out.to(x_ptr.dtype.element_ty), mask=mask)
