"""PTX instructions that kernels use, each with a twin for Triton's interpreter."""

from shardwise.ops.triton_support import interpreting, tl, triton

_INTERPRET = tl.constexpr(interpreting())

_PREFETCH = tl.constexpr("""
{
    .reg .pred p;
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 p, thread, 0;
    @p cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.b32 $0, 0;
}
""")


@triton.jit
def prefetch_to_l2(pointer, nbytes):
    """Ask for `nbytes` (a multiple of 16) at `pointer` (16-byte aligned) to be brought into the L2 cache.

    Compute capability 9.0. Only a hint: nothing waits for it.
    """
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            _PREFETCH, "=r,l,r", [pointer.to(tl.int64), nbytes.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )


_SILU = tl.constexpr("""
{
    .reg .f32 e;
    mul.ftz.f32 e, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 e, e;
    add.ftz.f32 e, e, 0f3F800000;
    rcp.approx.ftz.f32 e, e;
    mul.ftz.f32 $0, $1, e;
}
""")


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) of float32 numbers, in five instructions: Triton's exponential and division take 20.

    The forms that count denormals as zero need no scaling around them.
    """
    if _INTERPRET:
        out = x * tl.sigmoid(x)
    else:
        out = tl.inline_asm_elementwise(_SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return out


_LOGISTIC = tl.constexpr("""
{
    .reg .f32 e;
    ex2.approx.ftz.f32 e, $1;
    add.ftz.f32 e, e, 0f3F800000;
    rcp.approx.ftz.f32 $0, e;
}
""")


@triton.jit
def logistic(x):
    """1 / (1 + 2**x) of float32 numbers, in three instructions."""
    if _INTERPRET:
        out = 1.0 / (1.0 + tl.exp2(x))
    else:
        out = tl.inline_asm_elementwise(_LOGISTIC, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return out


@triton.jit
def keep_loads_above():
    """Loads that stand above are issued before what stands below.

    ptxas gathers a loop's loads at the end of its body, where nothing is left to do while they are on their way; it
    moves none over a barrier, and a warp's own costs one instruction.
    """
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def finish_products():
    """Wait for all matrix products of this warp (wgmma: compute capability 9 alone). To be the last statement of a
    loop over products whose left operand was made in registers.

    Triton 3.6 leaves such products running into the next round. Their registers are theirs until they end, but ptxas
    (12.8) keeps that promise to the end of the round only and then loads new values there: wrong sums, now and then.
    """
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


_WIDEN = tl.constexpr("""
{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 pair, other;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 pair, low;
    cvt.rn.f16x2.e4m3x2 other, high;
    mov.b32 {a, b}, pair;
    mov.b32 {c, d}, other;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}
""")


@triton.jit
def _code_of_byte(words, BYTE: tl.constexpr):
    """e4m3 is float32 with fewer bits and an exponent that is 120 less biased, also where it is subnormal."""
    code = words >> (8 * BYTE)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def four_e4m3(words):
    """The four e4m3 codes of each int32 word as float32 tensors of the words' shape, lowest byte first.

    Compute capability 8.9. Words that wait in registers stay words: a tensor of codes that a loop carries is taken
    apart and put together again in every round. 1.5 instructions a code, by the hardware's conversion of pairs.
    """
    if _INTERPRET:
        out = (_code_of_byte(words, 0), _code_of_byte(words, 1), _code_of_byte(words, 2), _code_of_byte(words, 3))
    else:
        out = tl.inline_asm_elementwise(
            _WIDEN,
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return out
