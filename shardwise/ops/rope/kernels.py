"""Triton kernels of the rotary embeddings: every element read and written once, angles in float32.

A position outside the table of angles gives NaN instead of a read out of bounds.
"""

from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _angles(freqs_ptr, position, positions, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines [1, HALF] of a position, from a table [positions, SIZE/2, 2] whose pairs are read whole."""
    i, part = tl.arange(0, HALF)[None, :, None], tl.arange(0, 2)[None, None, :]
    known = (position >= 0) & (position < positions) & (i < SIZE // 2)
    pairs = tl.load(freqs_ptr + position * SIZE + 2 * i + part, mask=known, other=float("nan"))
    return tl.split(pairs.to(tl.float32))


@triton.jit
def _turn(first, second, cos, sin):
    """Each sum has one rounded product, the same one in every tile: what a token gives depends on no other."""
    return tl.fma(first, cos, -second * sin), tl.fma(second, cos, first * sin)


@triton.jit(do_not_specialize=["tokens", "heads", "positions"])
def halves_kernel(
    x_ptr,
    out_ptr,
    freqs_ptr,
    start_ptr,
    tokens,
    heads,
    positions,
    x_b,
    x_s,
    x_n,
    out_b,
    out_s,
    out_n,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of one (sequence, token): element i turns with i + SIZE/2 by the angle of position start + token."""
    row = tl.program_id(0).to(tl.int64) // tl.cdiv(heads, HEADS)
    batch, token = row // tokens, row % tokens
    # 64-bit: a head's stride may be all positions of a long sequence.
    head = ((tl.program_id(0) % tl.cdiv(heads, HEADS)) * HEADS + tl.arange(0, HEADS)[:, None]).to(tl.int64)
    i = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < SIZE // 2)
    source = x_ptr + batch * x_b + token * x_s + head * x_n + i
    target = out_ptr + batch * out_b + token * out_s + head * out_n + i
    await_predecessor(PDL)
    # Asked for first: they need not wait for the position.
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(start_ptr + batch).to(tl.int64) + token
    cos, sin = _angles(freqs_ptr, position, positions, SIZE, HALF)
    first, second = _turn(first, second, cos, sin)
    tl.store(target, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + SIZE // 2, second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _position(row, begin, sequences, start_ptr, length_ptr, first_row_ptr, SEQUENCES: tl.constexpr):
    """The position of `row` if it belongs to one of SEQUENCES sequences from `begin` on, else -1."""
    member = begin + tl.arange(0, SEQUENCES)
    valid = member < sequences
    first_row = tl.load(first_row_ptr + member, mask=valid, other=0).to(tl.int64)
    length = tl.load(length_ptr + member, mask=valid, other=0).to(tl.int64)
    start = tl.load(start_ptr + member, mask=valid, other=0).to(tl.int64)
    inside = (row >= first_row) & (row < first_row + length)
    return tl.max(tl.where(inside, start + row - first_row, -1), axis=0)


@triton.jit(do_not_specialize=["heads", "positions", "sequences"])
def flat_kernel(
    x_ptr,
    out_ptr,
    freqs_ptr,
    start_ptr,
    length_ptr,
    first_row_ptr,
    heads,
    positions,
    sequences,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    MORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of one token of a flattened batch; a row that belongs to no sequence is copied.

    MORE: there are more than SEQUENCES sequences. Without a loop all that does not depend on the position comes first.
    """
    row = tl.program_id(0).to(tl.int64) // tl.cdiv(heads, HEADS)
    head = (tl.program_id(0) % tl.cdiv(heads, HEADS)) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < SIZE // 2)
    offset = (row * heads + head) * SIZE + i
    await_predecessor(PDL)
    first = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offset + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    position = _position(row, 0, sequences, start_ptr, length_ptr, first_row_ptr, SEQUENCES)
    if MORE:
        for begin in range(SEQUENCES, sequences, SEQUENCES):
            found = _position(row, begin, sequences, start_ptr, length_ptr, first_row_ptr, SEQUENCES)
            position = tl.maximum(position, found)
    cos, sin = _angles(freqs_ptr, position, positions, SIZE, HALF)
    first, second = _turn(first, second, tl.where(position < 0, 1.0, cos), tl.where(position < 0, 0.0, sin))
    tl.store(out_ptr + offset, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offset + SIZE // 2, second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_pairs(source, i, d_stride, mask, PACKED: tl.constexpr):
    """Elements 2i and 2i + 1 as float32. PACKED: both in one 32-bit load, so that accesses stay wide."""
    if PACKED:
        kind = source.dtype.element_ty
        pair = tl.load(source.to(tl.pointer_type(tl.uint32), bitcast=True) + i, mask=mask, other=0)
        even = (pair & 0xFFFF).to(tl.uint16).to(kind, bitcast=True)
        odd = (pair >> 16).to(tl.uint16).to(kind, bitcast=True)
    else:
        channel = 2 * i.to(tl.int64)
        even = tl.load(source + channel * d_stride, mask=mask, other=0.0)
        odd = tl.load(source + (channel + 1) * d_stride, mask=mask, other=0.0)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _store_turned(target, even, odd, cos, sin, mask, SIZE: tl.constexpr, HALF: tl.constexpr):
    """The pairs turned, first elements before the second ones."""
    i = tl.arange(0, HALF)[None, :]
    first, second = _turn(even, odd, cos, sin)
    tl.store(target + i, first.to(target.dtype.element_ty), mask=mask)
    tl.store(target + SIZE // 2 + i, second.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "q_heads", "k_heads", "positions"])
def interleaved_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    tokens,
    q_heads,
    k_heads,
    positions,
    q_b,
    q_s,
    q_n,
    q_d,
    k_b,
    k_s,
    k_n,
    k_d,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, block): Q_HEADS heads of q and K_HEADS of k. All is read before anything is written."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    i = tl.arange(0, HALF)[None, :]
    q_head = (tl.program_id(1) * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]).to(tl.int64)
    k_head = (tl.program_id(1) * K_HEADS + tl.arange(0, K_HEADS)[:, None]).to(tl.int64)
    q_mask = (q_head < q_heads) & (i < SIZE // 2)
    k_mask = (k_head < k_heads) & (i < SIZE // 2)
    await_predecessor(PDL)
    position = tl.load(position_ptr + row).to(tl.int64)
    known = (i < SIZE // 2) & (position >= 0) & (position < positions)
    cos = tl.load(cos_ptr + position * SIZE + i, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + position * SIZE + i, mask=known, other=float("nan")).to(tl.float32)
    q_even, q_odd = _load_pairs(q_ptr + batch * q_b + token * q_s + q_head * q_n, i, q_d, q_mask, PACKED)
    k_even, k_odd = _load_pairs(k_ptr + batch * k_b + token * k_s + k_head * k_n, i, k_d, k_mask, PACKED)
    _store_turned(q_out_ptr + (row * q_heads + q_head) * SIZE, q_even, q_odd, cos, sin, q_mask, SIZE, HALF)
    _store_turned(k_out_ptr + (row * k_heads + k_head) * SIZE, k_even, k_odd, cos, sin, k_mask, SIZE, HALF)
