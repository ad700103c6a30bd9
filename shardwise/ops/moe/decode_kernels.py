"""Kernels of `decode.py`: routing and the two products of a token's experts, for plain and MXFP4 weights.

MXFP4 weights stay in the order of their words (`mxfp4_layout.py`): a word's eight values are multiplied where they are
unpacked, each thread with its own 16 columns of x for two rows, and only sums change threads. Float32 x spares a
conversion of each.
"""

from shardwise.ops.moe.mxfp4_convert import _factors, _plain
from shardwise.ops.triton_support import tl, triton

# A word to eight float32: as `mxfp4_convert.py` makes bfloat16 of it, whose bits are a float32's upper half.
_UNPACK = """
{
    .reg .b32 a, b, r0, r1, r2, r3;
    and.b32 r0, $8, 0x81C081C0;
    shf.r.wrap.b32 a, $8, $8, 6;
    and.b32 r1, a, 0x81C081C0;
    shl.b32 a, $8, 6;
    and.b32 r2, a, 0x81C081C0;
    shl.b32 a, $8, 4;
    shr.b32 b, $8, 4;
    and.b32 a, a, 0x81808180;
    lop3.b32 r3, b, 0x00400040, a, 0xEA;
"""
_SCALE = """
    mul.rn.bf16x2 r0, r0, %s;
    mul.rn.bf16x2 r1, r1, %s;
    mul.rn.bf16x2 r2, r2, %s;
    mul.rn.bf16x2 r3, r3, %s;
"""
_WIDEN = """
    shl.b32 $0, r0, 16;
    and.b32 $1, r0, 0xFFFF0000;
    shl.b32 $2, r1, 16;
    and.b32 $3, r1, 0xFFFF0000;
    shl.b32 $4, r2, 16;
    and.b32 $5, r2, 0xFFFF0000;
    shl.b32 $6, r3, 16;
    and.b32 $7, r3, 0xFFFF0000;
}
"""
_NARROW = tl.constexpr(_UNPACK + _SCALE % ("$9", "$10", "$9", "$10") + _WIDEN)
_WIDE = tl.constexpr(
    _UNPACK
    + ".reg .b32 big; mov.b32 big, 0x7E807E80;"
    + _SCALE % ("big", "big", "big", "big")
    + _SCALE % ("$9", "$10", "$9", "$10")
    + _WIDEN
)
_SHAPE = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r")


@triton.jit
def _start(PDL: tl.constexpr):
    """Wait for the kernel before, and only then let the next one begin: it may read what that kernel wrote."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _choose(
    logit_ptr, slot_ptr, choice, experts, scale, E_BLOCK: tl.constexpr, E_CHUNK: tl.constexpr, TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Local slot and weight of a token's expert number `choice`, from its logits: ranks by comparing all with all."""
    e = tl.arange(0, E_BLOCK)
    logits = tl.load(logit_ptr + e, mask=e < experts, other=float("-inf"))
    rank = tl.zeros([E_BLOCK], tl.int32)
    for start in tl.static_range(0, E_BLOCK, E_CHUNK):
        o = start + tl.arange(0, E_CHUNK)
        others = tl.load(logit_ptr + o, mask=o < experts, other=float("-inf"))
        before = (others[:, None] > logits[None, :]) | (
            (others[:, None] == logits[None, :]) & (o[:, None] < e[None, :])
        )
        rank += tl.sum(before.to(tl.int32), 0)
    mine = rank == choice
    expert = tl.sum(tl.where(mine, e, 0), 0)
    powers = tl.exp(logits - tl.max(logits, 0))
    total = tl.sum(tl.where(rank < TOP_K, powers, 0.0), 0) if NORMALIZE else tl.sum(powers, 0)
    return tl.load(slot_ptr + expert), scale * tl.sum(tl.where(mine, powers, 0.0), 0) / total


@triton.jit
def _route(
    logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, experts, scale, E_BLOCK: tl.constexpr, E_CHUNK: tl.constexpr,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Slot and weight of this program's pair, -1 if it is nobody's here; the pair's first program writes both down."""
    pair = tl.program_id(1)
    token = pair // TOP_K
    slot, weight = _choose(
        logit_ptr + token * experts, slot_ptr, pair % TOP_K, experts, scale, E_BLOCK, E_CHUNK, TOP_K, NORMALIZE
    )
    if PADDED:
        slot = tl.where(tl.load(position_ptr + token) < 0, -1, slot)
    if tl.program_id(0) == 0:
        tl.store(id_ptr + pair, slot)
        tl.store(route_ptr + pair, weight)
    return slot, weight


@triton.jit
def _activate(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        return up * gate / (1.0 + tl.exp(-alpha * gate))
    return up * gate / (1.0 + tl.exp(-gate))


@triton.jit(do_not_specialize=["scale", "alpha", "limit"])
def plain_up(
    x_ptr, logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, out_ptr, size, hidden, experts, scale, alpha, limit,
    weight_ptr, bias_ptr,
    TOP_K: tl.constexpr, E_BLOCK: tl.constexpr, E_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr,
    CLAMPED: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one pair's activation, times the pair's weight."""
    _start(PDL)
    slot, weight = _route(
        logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, experts, scale, E_BLOCK, E_CHUNK, TOP_K, NORMALIZE, PADDED
    )
    if slot < 0:
        return
    pair = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < size
    column = tl.arange(0, BLOCK_K)
    up_rows = weight_ptr + (slot.to(tl.int64) * 2 * size + rows)[:, None] * hidden + column[None, :]
    gate_rows = up_rows + size.to(tl.int64) * hidden
    x_ptr += (pair // TOP_K).to(tl.int64) * hidden
    ups = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gates = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
        here = inside[:, None] & (start + column < hidden)[None, :]
        u = tl.load(up_rows + start, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(gate_rows + start, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_ptr + start + column, mask=start + column < hidden, other=0.0).to(tl.float32)
        ups += u * x[None, :]
        gates += g * x[None, :]
    up = tl.sum(ups, 1)
    gate = tl.sum(gates, 1)
    if BIAS:
        biases = bias_ptr + slot * 2 * size + rows
        up += tl.load(biases, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(biases + size, mask=inside, other=0.0).to(tl.float32)
    value = weight * _activate(gate, up, alpha, limit, CLAMPED)
    tl.store(out_ptr + pair.to(tl.int64) * size + rows, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _local_choices(id_ptr, TOP_K: tl.constexpr):
    """A token's local experts in the order of its choices: their number; slots, a byte each; choices, a byte each."""
    count = 0
    slots = tl.full([], 0, tl.int64)
    choices = tl.full([], 0, tl.int64)
    for choice in tl.static_range(TOP_K):
        slot = tl.load(id_ptr + choice)
        held = slot >= 0
        slots += tl.where(held, slot.to(tl.int64) << (8 * count), 0)
        choices += tl.where(held, tl.full([], choice, tl.int64) << (8 * count), 0)
        count += held.to(tl.int32)
    return count, slots, choices


@triton.jit
def _byte(word, number):
    return ((word >> (8 * number)) & 0xFF).to(tl.int32)


@triton.jit
def _store_sum(total, rows, inside, residual_ptr, out_ptr, hidden, RESIDUAL: tl.constexpr):
    at = tl.program_id(1).to(tl.int64) * hidden + rows
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def plain_down(
    inner_ptr, id_ptr, route_ptr, residual_ptr, out_ptr, hidden, size, weight_ptr, bias_ptr,
    TOP_K: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one token's sum, one expert behind the other in one loop."""
    _start(PDL)
    pair = tl.program_id(1) * TOP_K
    count, slots, choices = _local_choices(id_ptr + pair, TOP_K)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < hidden
    column = tl.arange(0, BLOCK_K)
    row_at = rows.to(tl.int64)[:, None] * size + column[None, :]
    steps = tl.cdiv(size, BLOCK_K)
    totals = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for index in tl.range(0, count * steps, num_stages=STAGES):
        number = index // steps
        start = index % steps * BLOCK_K
        here = start + column < size
        expert = weight_ptr + _byte(slots, number).to(tl.int64) * hidden * size + start
        choice = _byte(choices, number)
        w = tl.load(expert + row_at, mask=inside[:, None] & here[None, :], other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        x = tl.load(inner_ptr + (pair + choice).to(tl.int64) * size + start + column, mask=here, other=0.0)
        totals += w * x[None, :]
    total = tl.sum(totals, 1)
    if BIAS:
        for number in range(count):
            biases = tl.load(bias_ptr + _byte(slots, number) * hidden + rows, mask=inside, other=0.0).to(tl.float32)
            total += biases * tl.load(route_ptr + pair + _byte(choices, number))
    _store_sum(total, rows, inside, residual_ptr, out_ptr, hidden, RESIDUAL)


@triton.jit
def _slab(word_ptr, scale_ptr, slot, tiles_n, tiles_k):
    """Pointers at the first words and scales of this program's 16 rows of an expert."""
    slab = tl.program_id(0)
    tile = (slot.to(tl.int64) * tiles_n + slab // 4) * tiles_k * 4 + slab % 4
    return word_ptr + tile * 128, scale_ptr + tile * 8


@triton.jit
def _values(word, scale, CHUNKS: tl.constexpr, FORMAT: tl.constexpr, INTERPRET: tl.constexpr):
    """Words [C, 8, 4, 4] with scales [C, 8] to eight float32 tensors, as `mxfp4_convert._plain` orders them."""
    low, high = _factors(scale, CHUNKS, 1, FORMAT)
    word = tl.reshape(word, (CHUNKS, 1, 8, 4, 4))
    low, _ = tl.broadcast(low, word)
    high, _ = tl.broadcast(high, word)
    if INTERPRET:
        return _plain(word, low, high, FORMAT)
    elif FORMAT == "narrow":
        return tl.inline_asm_elementwise(
            _NARROW, _SHAPE, [word, low, high], dtype=(tl.float32,) * 8, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            _WIDE, _SHAPE, [word, low, high], dtype=(tl.float32,) * 8, is_pure=True, pack=1
        )


@triton.jit
def _packed_step(near, far, word_ptr, scale_ptr, x_ptr, k, tiles_k, columns, CHUNKS: tl.constexpr,
                 FORMAT: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Add the products of CHUNKS tiles of 64 columns to the sums of rows 0..7 and of rows 8..15."""
    chunk = k + tl.arange(0, CHUNKS)
    inside = (chunk < tiles_k)[:, None]
    words = tl.load(word_ptr + chunk[:, None] * 512 + tl.arange(0, 128)[None, :], mask=inside, other=0)
    scales = tl.load(scale_ptr + chunk[:, None] * 32 + tl.arange(0, 8)[None, :], mask=inside, other=0)
    # A word's columns: its step of 16, its half of 8, its lane's neighbours.
    at = chunk[:, None, None] * 64 + tl.arange(0, 4)[None, :, None] * 2 + tl.arange(0, 4)[None, None, :] * 16
    a0, a1, b0, b1, c0, c1, d0, d1 = _values(words, scales, CHUNKS, FORMAT, INTERPRET)
    x0 = _x_of(x_ptr, at, columns)
    x1 = _x_of(x_ptr, at + 1, columns)
    x2 = _x_of(x_ptr, at + 8, columns)
    x3 = _x_of(x_ptr, at + 9, columns)
    near += a0 * x0
    near += a1 * x1
    near += c0 * x2
    near += c1 * x3
    far += b0 * x0
    far += b1 * x1
    far += d0 * x2
    far += d1 * x3
    return near, far


@triton.jit
def _x_of(x_ptr, at, columns):
    return tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)[:, None, None, :, :]


@triton.jit
def _rows_of(sums):
    """[C, 1, 8, 4, 4] to [8]."""
    return tl.sum(tl.sum(tl.sum(tl.sum(sums, 4), 3), 1), 0)


@triton.jit(do_not_specialize=["scale", "alpha", "limit"])
def packed_up(
    x_ptr, logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, out_ptr, size, hidden, experts, scale, alpha, limit,
    word_ptr, scale_ptr, bias_ptr, tiles_n, tiles_k,
    TOP_K: tl.constexpr, E_BLOCK: tl.constexpr, E_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr,
    CLAMPED: tl.constexpr, PDL: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, FORMAT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Eight rows of one pair's activation, times the pair's weight: gates are the first eight of the program's rows."""
    _start(PDL)
    slot, weight = _route(
        logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, experts, scale, E_BLOCK, E_CHUNK, TOP_K, NORMALIZE, PADDED
    )
    if slot < 0:
        return
    pair = tl.program_id(1)
    words, scales = _slab(word_ptr, scale_ptr, slot, tiles_n, tiles_k)
    x_ptr += (pair // TOP_K).to(tl.int64) * hidden
    gates = tl.zeros([CHUNKS, 1, 8, 4, 4], tl.float32)
    ups = tl.zeros([CHUNKS, 1, 8, 4, 4], tl.float32)
    for k in tl.range(0, tiles_k, CHUNKS, num_stages=STAGES):
        gates, ups = _packed_step(gates, ups, words, scales, x_ptr, k, tiles_k, hidden, CHUNKS, FORMAT, INTERPRET)
    row = tl.arange(0, 8)
    biases = bias_ptr + (slot * tiles_n * 4 + tl.program_id(0)) * 16 + row
    gate = _rows_of(gates) + tl.load(biases)
    value = weight * _activate(gate, _rows_of(ups) + tl.load(biases + 8), alpha, limit, CLAMPED)
    rows = tl.program_id(0) * 8 + row
    tl.store(out_ptr + pair.to(tl.int64) * size + rows, value.to(out_ptr.dtype.element_ty), mask=rows < size)


@triton.jit
def packed_down(
    inner_ptr, id_ptr, route_ptr, residual_ptr, out_ptr, hidden, size, word_ptr, scale_ptr, bias_ptr, tiles_n, tiles_k,
    TOP_K: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    FORMAT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sixteen rows of one token's sum, one expert behind the other in one loop."""
    _start(PDL)
    pair = tl.program_id(1) * TOP_K
    count, slots, choices = _local_choices(id_ptr + pair, TOP_K)
    steps = tl.cdiv(tiles_k, CHUNKS)
    near = tl.zeros([CHUNKS, 1, 8, 4, 4], tl.float32)
    far = tl.zeros([CHUNKS, 1, 8, 4, 4], tl.float32)
    for index in tl.range(0, count * steps, num_stages=STAGES):
        number = index // steps
        choice = pair + _byte(choices, number)
        words, scales = _slab(word_ptr, scale_ptr, _byte(slots, number), tiles_n, tiles_k)
        near, far = _packed_step(
            near, far, words, scales, inner_ptr + choice.to(tl.int64) * size, index % steps * CHUNKS, tiles_k, size,
            CHUNKS, FORMAT, INTERPRET,
        )  # fmt: skip
    upper = _rows_of(near)
    lower = _rows_of(far)
    row = tl.arange(0, 8)
    for number in range(count):
        biases = bias_ptr + (_byte(slots, number) * tiles_n * 4 + tl.program_id(0)) * 16 + row
        weight = tl.load(route_ptr + pair + _byte(choices, number))
        upper += tl.load(biases) * weight
        lower += tl.load(biases + 8) * weight
    row += tl.program_id(0) * 16
    _store_sum(upper, row, row < hidden, residual_ptr, out_ptr, hidden, RESIDUAL)
    _store_sum(lower, row + 8, row + 8 < hidden, residual_ptr, out_ptr, hidden, RESIDUAL)
