"""Triton kernels of `prefill.py`: chunks of a prompt by themselves, then one after another through the states."""

from shardwise.ops.fla.rule_kernels import token_gates
from shardwise.ops.triton_support import await_alone, tl, triton


@triton.jit
def place_of(chunk, bounds_ptr, sequences, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr):
    """First token of a chunk and its sequence's end: sequences are cut one by one. Behind the last, both are equal."""
    j = tl.arange(0, SEQUENCES)
    low = tl.load(bounds_ptr + j, mask=j < sequences, other=0)
    high = tl.load(bounds_ptr + j + 1, mask=j < sequences, other=0)
    ends = tl.cumsum(tl.cdiv(high - low, CHUNK), axis=0)
    done = (ends <= chunk) & (j < sequences)
    sequence = tl.sum(done.to(tl.int32), axis=0)
    before = tl.max(tl.where(done, ends, 0), axis=0)
    mine = j == sequence
    first = tl.sum(tl.where(mine, low, 0), axis=0) + (chunk - before) * CHUNK
    end = tl.sum(tl.where(mine, high, 0), axis=0)
    return tl.where(sequence < sequences, first, end), end


@triton.jit
def inverse(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular a [CHUNK, CHUNK], CHUNK 64.

    From blocks to blocks of twice the size: where X inverts the diagonal blocks and L lies between two of them,
    (X^-1 + L)^-1 is X - X L X, since L X L is zero. Nothing grows beyond the inverse itself, whatever a holds.
    """
    tl.static_assert(CHUNK == 64)
    c = tl.arange(0, CHUNK)
    x = tl.where(c[:, None] == c[None, :], 1.0, 0.0)
    for level in tl.static_range(6):
        row, column = c[:, None] >> level, c[None, :] >> level
        between = tl.where((row == column + 1) & (row % 2 == 1), a, 0.0)
        if level == 0:
            x -= between
        else:
            left = tl.dot(x, between, input_precision=PRECISION)
            x -= tl.dot(left, x, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=["sequences"])
def chunk_kernel(
    rows_ptr,  # [T, ...]: [queries | keys | values | output gates | beta | decay], the first three convolved
    bounds_ptr,  # int32 [sequences + 1]
    decay_ptr,  # float32 [VALUES]
    bias_ptr,  # float32 [VALUES]
    units_ptr,  # [T, 2 KEYS, K], out: queries (scaled) and keys at length 1
    w_ptr,  # [T, VALUES, K], out
    u_ptr,  # [T, VALUES, V], out
    p_ptr,  # [T, VALUES, CHUNK], out: the weights of a chunk's updates in its results
    total_ptr,  # float32 [T, VALUES], out: logarithm of the decay since the chunk's start
    sequences,
    row_stride,
    scale,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    SEQUENCES: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The updates of a chunk are u - w S, with S the state before it: both are the chunk's inverse times what beta
    scales, values and faded keys. As `fla/delta.py`, for one chunk and value head."""
    await_alone(PDL)
    first, end = place_of(tl.program_id(0), bounds_ptr, sequences, CHUNK, SEQUENCES)
    if first >= end:
        return
    head = tl.program_id(1)
    KIND: tl.constexpr = rows_ptr.dtype.element_ty
    c, i, j = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    t = (first + c).to(tl.int64)
    live, in_k, in_v = first + c < end, (i < K)[None, :], (j < V)[None, :]
    shared = head // (VALUES // KEYS)
    row = rows_ptr + t[:, None] * row_stride
    mask = live[:, None] & in_k
    q = tl.load(row + shared * K + i[None, :], mask=mask, other=0.0).to(tl.float32)
    k = tl.load(row + (KEYS + shared) * K + i[None, :], mask=mask, other=0.0).to(tl.float32)
    q = (q * (scale * tl.rsqrt(tl.sum(q * q, axis=1) + 1e-6))[:, None]).to(KIND)
    k = (k * tl.rsqrt(tl.sum(k * k, axis=1) + 1e-6)[:, None]).to(KIND)
    if head % (VALUES // KEYS) == 0:
        unit = units_ptr + t[:, None] * (2 * KEYS * K) + shared * K + i[None, :]
        tl.store(unit, q, mask=mask)
        tl.store(unit + KEYS * K, k, mask=mask)
    numbers = rows_ptr + t * row_stride + 2 * KEYS * K + 2 * VALUES * V
    beta, decay = token_gates(numbers, decay_ptr, bias_ptr, head, live, VALUES)
    total = tl.cumsum(tl.where(live, decay, 0.0), axis=0)
    tl.store(total_ptr + t * VALUES + head, total, mask=live)
    between = tl.exp(tl.where(c[:, None] >= c[None, :], total[:, None] - total[None, :], float("-inf")))
    weights = between * tl.dot(q, tl.trans(k), input_precision="tf32x3")
    tl.store(p_ptr + (t * VALUES + head)[:, None] * CHUNK + c[None, :], weights.to(KIND), mask=live[:, None])
    among = beta[:, None] * between * tl.dot(k, tl.trans(k), input_precision="tf32x3")
    solved = inverse(tl.where(c[:, None] > c[None, :], among, 0.0), CHUNK, "tf32x3" if EXACT else "tf32").to(KIND)
    v = tl.load(row + 2 * KEYS * K + head * V + j[None, :], mask=live[:, None] & in_v, other=0.0).to(tl.float32)
    u = tl.dot(solved, (v * beta[:, None]).to(KIND), input_precision="tf32x3")
    tl.store(u_ptr + (t * VALUES + head)[:, None] * V + j[None, :], u.to(KIND), mask=live[:, None] & in_v)
    faded = (k.to(tl.float32) * (beta * tl.exp(total))[:, None]).to(KIND)
    w = tl.dot(solved, faded, input_precision="tf32x3")
    tl.store(w_ptr + (t * VALUES + head)[:, None] * K + i[None, :], w.to(KIND), mask=mask)


@triton.jit
def walk_kernel(
    units_ptr,
    w_ptr,
    u_ptr,
    p_ptr,
    total_ptr,
    bounds_ptr,
    slot_ptr,  # int [sequences]
    resume_ptr,  # bool [sequences]
    cache_ptr,  # float32 [slots, VALUES, K, V]
    out_ptr,  # [T, VALUES, V]
    cache_slot,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A sequence's chunks in order, for one value head and BLOCK_V columns of its state."""
    await_alone(PDL)
    sequence, head = tl.program_id(1) // VALUES, tl.program_id(1) % VALUES
    c, i, j = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = (i < K)[None, :], (j < V)[None, :]
    KIND: tl.constexpr = u_ptr.dtype.element_ty
    first, end = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    cached = cache_ptr + tl.load(slot_ptr + sequence).to(tl.int64) * cache_slot + head * K * V
    cached += i[:, None] * V + j[None, :]
    tile = (i < K)[:, None] & in_v
    resumes = tl.load(resume_ptr + sequence).to(tl.int1)
    state = tl.load(cached, mask=tile & resumes, other=0.0)
    shared = head // (VALUES // KEYS) * K
    for begin in range(first, end, CHUNK):
        t = (begin + c).to(tl.int64)
        live = (begin + c < end)[:, None]
        at = t * VALUES + head
        unit = units_ptr + t[:, None] * (2 * KEYS * K) + shared + i[None, :]
        q = tl.load(unit, mask=live & in_k, other=0.0)
        k = tl.load(unit + KEYS * K, mask=live & in_k, other=0.0)
        w = tl.load(w_ptr + at[:, None] * K + i[None, :], mask=live & in_k, other=0.0)
        u = tl.load(u_ptr + at[:, None] * V + j[None, :], mask=live & in_v, other=0.0)
        p = tl.load(p_ptr + at[:, None] * CHUNK + c[None, :], mask=live, other=0.0)
        total = tl.load(total_ptr + at, mask=begin + c < end, other=0.0)
        last = tl.load(total_ptr + (tl.minimum(begin + CHUNK, end) - 1).to(tl.int64) * VALUES + head)
        before = state.to(KIND)
        update = u.to(tl.float32) - tl.dot(w, before, input_precision="tf32x3")
        out = tl.exp(total)[:, None] * tl.dot(q, before, input_precision="tf32x3")
        out += tl.dot(p, update.to(KIND), input_precision="tf32x3")
        tl.store(out_ptr + at[:, None] * V + j[None, :], out.to(KIND), mask=live & in_v)
        kept = (update * tl.where(live, tl.exp(last - total)[:, None], 0.0)).to(KIND)
        state = state * tl.exp(last) + tl.dot(tl.trans(k), kept, input_precision="tf32x3")
    tl.store(cached, state, mask=tile & (first < end))
