"""Kernel of `int4_many.py`: products with 4-bit weights of many tokens, on the matrix unit of Hopper.

Weights are the left operand and go from unpacking to the matrix unit in registers; tokens come by way of shared memory,
their columns in the order of the weights' fragments.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.linear.float8_kernels import parts_at, sum_of_parts
from shardwise.ops.linear.int4_kernels import UNPACK_BFLOAT, UNPACK_HALF, UNPACKED, plain_values
from shardwise.ops.ptx import finish_products
from shardwise.ops.quantization.int4_weight import scale_of
from shardwise.ops.tensor_memory import prefetch
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _weights(words, near, far, CHUNKS: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Words [C * S, 128] or [2 * C * S, 64], chunk-major, to code less zero point, [16 S, 64 C]; near and far [S, 8]
    have the zero points of rows r and r + 8 in their high halves.

    Lines of 128 or 64 words make the compiler deal 16 bytes to each lane and slabs to warps, as fragments want them.
    """
    SLABS: tl.constexpr = near.shape[0]
    HALF: tl.constexpr = tl.float16 == DTYPE
    NEGATIVE: tl.constexpr = 0 if INTERPRET else -0x1BFF1C00 if HALF else -0x3CFF3D00  # -1024.0 or -128.0, twice
    TWICE: tl.constexpr = 1 if INTERPRET else 0x10001
    words = tl.reshape(words, (CHUNKS, SLABS, 8, 4, 4))
    near, _ = tl.broadcast(((near >> 16) * TWICE + NEGATIVE)[None, :, :, None, None], words)
    far, _ = tl.broadcast(((far >> 16) * TWICE + NEGATIVE)[None, :, :, None, None], words)
    if INTERPRET:
        a0, a1, b0, b1, c0, c1, d0, d1 = plain_values(words, near, far)
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            UNPACK_HALF if HALF else UNPACK_BFLOAT, UNPACKED, [words, near, far], dtype=(tl.int16,) * 8, is_pure=True,
            pack=1,
        )  # fmt: skip
    near_half = tl.join(tl.join(a0, a1), tl.join(b0, b1))
    far_half = tl.join(tl.join(c0, c1), tl.join(d0, d1))
    bits = tl.join(near_half, far_half)  # [chunk, slab, row, lane, step, pair, row half, k-half]
    tile = tl.reshape(tl.permute(bits, (1, 6, 2, 0, 4, 7, 3, 5)), (SLABS * 16, CHUNKS * 64))
    if INTERPRET:
        return tile
    return tile.to(DTYPE, bitcast=True)


@triton.jit
def turn_kernel(x_ptr, out_ptr, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Token rows whose columns are in the order of the weights' fragments: BLOCK columns of one."""
    await_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64) * K
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = place // 32 * 32 + place % 8 // 2 * 8 + place % 32 // 8 * 2 + place % 2
    x = tl.load(x_ptr + row + column, mask=place < K, other=0.0)
    tl.store(out_ptr + row + place, x, mask=place < K)


@triton.jit(do_not_specialize=["tokens"])
def many_int4_kernel(
    x, word_ptr, beside_ptr, bias_ptr, residual_ptr, out_ptr, part_ptr, count_ptr, tokens, N, K,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HALF: tl.constexpr, AHEAD: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN outputs of BT tokens, or a part of K's share of them; the last part to arrive adds up all, in their order.

    x       descriptor of [T, K] in tiles [BT, GROUP], turned
    GROUP   64 or 128
    AHEAD   groups of a part whose words are asked for before the tokens are there
    """
    CHUNKS: tl.constexpr = GROUP // 64
    SLABS: tl.constexpr = BN // 16
    tile, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = K // GROUP
    each = tl.cdiv(groups, SPLITS)
    last = tl.cdiv(N, 16) - 1
    # Loads of equal shape share one thread layout; these words must not get the one of a tile of 128 tokens' columns.
    HALVES: tl.constexpr = 2 if GROUP == 128 else 1
    line = tl.arange(0, CHUNKS * SLABS * HALVES)
    slab = tl.minimum(tile * SLABS + line // HALVES % SLABS, last)
    words_at = (slab * (groups * CHUNKS) + line // HALVES // SLABS) * 128 + line % HALVES * (128 // HALVES)
    words_at = word_ptr + words_at[:, None] + tl.arange(0, 128 // HALVES)[None, :]
    slab = tl.minimum(tile * SLABS + tl.arange(0, SLABS), last)
    beside_at = beside_ptr + (slab * groups * 16)[:, None] + tl.arange(0, 8)[None, :]
    n = tile * BN + tl.arange(0, BN)
    scale_at = beside_ptr + tl.minimum(n // 16, last) * groups * 16 + n % 16
    if AHEAD > 0:
        place = tl.arange(0, SLABS * CHUNKS * AHEAD * 4)  # lines of 128 bytes
        slab = tl.minimum(tile * SLABS + place // (CHUNKS * AHEAD * 4), last)
        lines = (slab * groups + part * each) * CHUNKS * 128 + place % (CHUNKS * AHEAD * 4) * 32
        prefetch(word_ptr + tl.minimum(lines, (last + 1) * groups * CHUNKS * 128 - 32), INTERPRET)
    await_predecessor(PDL)
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    for group in tl.range(part * each, min(part * each + each, groups), num_stages=STAGES):
        words = tl.load(words_at + group * (CHUNKS * 128))
        near = tl.load(beside_at + group * 16)
        far = tl.load(beside_at + (group * 16 + 8))
        scale = scale_of(tl.load(scale_at + group * 16), HALF)
        inputs = x.load([block * BT, group * GROUP])
        weights = _weights(words, near, far, CHUNKS, inputs.dtype, INTERPRET)
        if INTERPRET:
            acc += tl.dot(weights, tl.trans(inputs).to(tl.float32), input_precision="ieee") * scale[:, None]
        else:
            found = tl.dot(weights, tl.trans(inputs))
            finish_products()
            acc += found * scale[:, None]
    if SPLITS > 1:
        place = block * tl.num_programs(0) + tile
        parts = parts_at(part_ptr, place, SPLITS, BN, BT)
        tl.store(parts + part * BN * BT, acc)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(count_ptr + place, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(count_ptr + place, 0)
        acc = sum_of_parts(parts, SPLITS, BN, BT)
    t = block * BT + tl.arange(0, BT)
    inside = (n < N)[:, None] & (t < tokens)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = t[None, :] * N + n[:, None]
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
