"""Rotary position embeddings as Triton kernels: every element read and written once, angles in float32.

A position outside the table of angles gives NaN instead of a read out of bounds.
"""

import torch

from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Kernel, await_predecessor, dependent_launch, tl, triton

LAYOUTS = ("bsnd", "bnsd", "sbnd", "snbd", "nbsd", "nsbd")


@triton.jit(do_not_specialize=["tokens", "heads", "positions"])
def _halves_kernel(
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
    head = (tl.program_id(0) % tl.cdiv(heads, HEADS)) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < SIZE // 2)
    await_predecessor(PDL)
    position = tl.load(start_ptr + batch).to(tl.int64) + token
    known = (i < SIZE // 2) & (position >= 0) & (position < positions)
    cos = tl.load(freqs_ptr + position * SIZE + 2 * i, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(freqs_ptr + position * SIZE + 2 * i + 1, mask=known, other=float("nan")).to(tl.float32)
    source = x_ptr + batch * x_b + token * x_s + head * x_n + i
    target = out_ptr + batch * out_b + token * out_s + head * out_n + i
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + SIZE // 2, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "positions", "sequences"])
def _flat_kernel(
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
    PDL: tl.constexpr,
):
    """Rows of one token of a flattened batch; a row that belongs to no sequence is copied."""
    row = tl.program_id(0).to(tl.int64) // tl.cdiv(heads, HEADS)
    head = (tl.program_id(0) % tl.cdiv(heads, HEADS)) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < SIZE // 2)
    await_predecessor(PDL)
    position = tl.zeros((1,), tl.int64) - 1
    for begin in range(0, sequences, SEQUENCES):
        member = begin + tl.arange(0, SEQUENCES)
        valid = member < sequences
        first_row = tl.load(first_row_ptr + member, mask=valid, other=0).to(tl.int64)
        length = tl.load(length_ptr + member, mask=valid, other=0).to(tl.int64)
        start = tl.load(start_ptr + member, mask=valid, other=0).to(tl.int64)
        inside = (row >= first_row) & (row < first_row + length)
        position = tl.maximum(position, tl.max(tl.where(inside, start + row - first_row, -1), axis=0))
    angle = position[:, None] * SIZE + 2 * i
    known = (i < SIZE // 2) & (position[:, None] >= 0) & (position[:, None] < positions)
    cos = tl.load(freqs_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(freqs_ptr + angle + 1, mask=known, other=float("nan")).to(tl.float32)
    cos = tl.where(position[:, None] < 0, 1.0, cos)
    sin = tl.where(position[:, None] < 0, 0.0, sin)
    offset = (row * heads + head) * SIZE + i
    first = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offset + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offset + SIZE // 2, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_pairs(source, i, d_stride, mask, PACKED: tl.constexpr):
    """Elements 2i and 2i + 1 as float32. PACKED: both in one 32-bit load, so that accesses stay wide."""
    if PACKED:
        kind = source.dtype.element_ty
        pair = tl.load(source.to(tl.pointer_type(tl.uint32), bitcast=True) + i, mask=mask, other=0)
        even = (pair & 0xFFFF).to(tl.uint16).to(kind, bitcast=True)
        odd = (pair >> 16).to(tl.uint16).to(kind, bitcast=True)
    else:
        even = tl.load(source + 2 * i * d_stride, mask=mask, other=0.0)
        odd = tl.load(source + (2 * i + 1) * d_stride, mask=mask, other=0.0)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _turn_pairs(
    source, target, d_stride, head, heads, cos, sin, SIZE: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr
):
    """Read interleaved pairs of a tile of heads, turn them, write the first elements before the second ones."""
    i = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < SIZE // 2)
    even, odd = _load_pairs(source, i, d_stride, mask, PACKED)
    tl.store(target + i, (even * cos - odd * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + SIZE // 2 + i, (odd * cos + even * sin).to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "q_heads", "k_heads", "positions"])
def _interleaved_kernel(
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
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, block of heads): the first blocks are heads of q, the rest heads of k."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    q_blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1)
    i = tl.arange(0, HALF)[None, :]
    await_predecessor(PDL)
    position = tl.load(position_ptr + row).to(tl.int64)
    known = (i < SIZE // 2) & (position >= 0) & (position < positions)
    cos = tl.load(cos_ptr + position * SIZE + i, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + position * SIZE + i, mask=known, other=float("nan")).to(tl.float32)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        source = q_ptr + batch * q_b + token * q_s + head * q_n
        target = q_out_ptr + (row * q_heads + head) * SIZE
        _turn_pairs(source, target, q_d, head, q_heads, cos, sin, SIZE, HALF, PACKED)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)[:, None]
        source = k_ptr + batch * k_b + token * k_s + head * k_n
        target = k_out_ptr + (row * k_heads + head) * SIZE
        _turn_pairs(source, target, k_d, head, k_heads, cos, sin, SIZE, HALF, PACKED)


_launch_halves = Kernel(_halves_kernel)
_launch_flat = Kernel(_flat_kernel)
_launch_interleaved = Kernel(_interleaved_kernel)


def _tile(size: int, heads: int, tokens: int) -> tuple[int, int, int]:
    """(elements of a half, heads of a tile, warps): 16 elements of each half a thread; short batches are spread out.

    By a sweep on an H200 at 32 heads of 128: tiles of 16 heads reach 97 % of a copy's speed, 4 heads 42 %.
    """
    half = 1 << (size // 2 - 1).bit_length()
    most = max(1, (1024 if tokens * heads >= 8192 else 256) // half)
    tile = min(1 << (heads - 1).bit_length(), most)
    return half, tile, max(1, min(8, half * tile // 512)) if most > 4 else 2


def _angles(name: str, freqs_cis: torch.Tensor, size: int) -> torch.Tensor:
    freqs = freqs_cis[0] if freqs_cis.dim() == 4 and freqs_cis.shape[0] == 1 else freqs_cis
    if size % 2 or freqs.dim() != 3 or freqs.shape[1:] != (size // 2, 2):
        raise ValueError(
            f"{name}: freqs_cis must be [positions, D/2, 2] for an even D = {size}, got {tuple(freqs_cis.shape)}"
        )
    return freqs.contiguous()


@operator(
    fake=lambda x, freqs_cis, input_pos, layout: torch.empty_like(x),
    needs=(TRITON,),
    instead="torch_rope_with_explicit_cos_sin",
)
def triton_rope_with_input_pos(
    x: torch.Tensor, freqs_cis: torch.Tensor, input_pos: torch.Tensor, layout: str
) -> torch.Tensor:
    """NeoX rotation; token t of batch row b has position input_pos[b] + t. Result with x's strides.

    x four-dimensional in the order of `layout` (one of bsnd bnsd sbnd snbd nbsd nsbd); freqs_cis real
    [positions, D/2, 2] holding (cos, sin), a leading 1 allowed; input_pos int [B], None for zeros.
    """
    name = "triton_rope_with_input_pos"
    if layout not in LAYOUTS or x.dim() != 4:
        raise ValueError(f"{name}: x must have 4 dimensions in one of {LAYOUTS}, got {tuple(x.shape)}, {layout!r}")
    b, s, n = (layout.index(axis) for axis in "bsn")
    batch, tokens, heads, size = x.shape[b], x.shape[s], x.shape[n], x.shape[3]
    freqs = _angles(name, freqs_cis, size)
    if input_pos is None:
        input_pos = torch.zeros(batch, dtype=torch.int32, device=x.device)
    if input_pos.numel() < batch:
        raise ValueError(f"{name}: input_pos holds {input_pos.numel()} positions for {batch} batch rows")
    out = torch.empty_like(x)
    x = x if x.stride(3) == 1 else x.contiguous()
    result = out if out.stride(3) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    half, tile, warps = _tile(size, heads, batch * tokens)
    strides = (x.stride(b), x.stride(s), x.stride(n), result.stride(b), result.stride(s), result.stride(n))
    pdl = dependent_launch(x.device)
    _launch_halves(
        x.device,
        (batch * tokens * ((heads + tile - 1) // tile), 1, 1),
        (x, result, freqs, input_pos),
        (tokens, heads, freqs.shape[0]),
        (*strides, size, half, tile, pdl),
        warps=warps,
        pdl=pdl,
    )
    return out if result is out else out.copy_(result)


@operator(
    fake=lambda x, freqs_cis, input_pos, seq_lens, seq_start_indices: torch.empty_like(x),
    needs=(TRITON,),
    instead="torch_rope_with_explicit_cos_sin",
)
def triton_rope_on_flattened_inputs(
    x: torch.Tensor,
    freqs_cis: torch.Tensor,
    input_pos: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_start_indices: torch.Tensor,
) -> torch.Tensor:
    """NeoX rotation of a flattened batch; rows that belong to no sequence are copied.

    x [T, N, D] contiguous; sequence i is the rows seq_start_indices[i] .. + seq_lens[i], its token t has position
    input_pos[i] + t; freqs_cis as in `triton_rope_with_input_pos`.
    """
    name = "triton_rope_on_flattened_inputs"
    if x.dim() != 3 or not x.is_contiguous():
        raise ValueError(f"{name}: x must be contiguous [T, N, D], got {tuple(x.shape)} with strides {x.stride()}")
    sequences = seq_lens.numel()
    if input_pos.numel() < sequences or seq_start_indices.numel() < sequences:
        raise ValueError(
            f"{name}: {sequences} seq_lens need as many input_pos ({input_pos.numel()}) and "
            f"seq_start_indices ({seq_start_indices.numel()})"
        )
    tokens, heads, size = x.shape
    freqs = _angles(name, freqs_cis, size)
    out = torch.empty_like(x)
    half, tile, warps = _tile(size, heads, tokens)
    block = min(256, 1 << max(sequences - 1, 0).bit_length())
    pdl = dependent_launch(x.device)
    _launch_flat(
        x.device,
        (tokens * ((heads + tile - 1) // tile), 1, 1),
        (x, out, freqs, input_pos, seq_lens, seq_start_indices),
        (heads, freqs.shape[0], sequences),
        (size, half, tile, block, pdl),
        warps=warps,
        pdl=pdl,
    )
    return out


def _contiguous_pair(q, k, *_args):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


@operator(fake=_contiguous_pair, needs=(TRITON,), instead="torch_rope_with_qk_interleaving")
def triton_rope_on_interleaved_qk_inputs(
    q: torch.Tensor, k: torch.Tensor, cos_cache: torch.Tensor, sin_cache: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's form: channel pairs (2i, 2i+1) are turned and land at (i, i + D/2). Results contiguous.

    q [B, S, N, D], k [B, S, Nkv, D], any strides; cos_cache, sin_cache [positions, D], halves duplicated;
    position_ids int [B, S].
    """
    _check_interleaved(q, k, cos_cache, sin_cache, position_ids)
    batch, tokens, heads, size = q.shape
    k_heads = k.shape[2]
    cos, sin, position_ids = cos_cache.contiguous(), sin_cache.contiguous(), position_ids.contiguous()
    q_out, k_out = _contiguous_pair(q, k)
    half, tile, warps = _tile(size, heads, batch * tokens)
    strides = (*q.stride(), *k.stride())
    pdl = dependent_launch(q.device)
    packed = _packable(q) and _packable(k)
    _launch_interleaved(
        q.device,
        (batch * tokens, (heads + tile - 1) // tile + (k_heads + tile - 1) // tile, 1),
        (q, k, q_out, k_out, cos, sin, position_ids),
        (tokens, heads, k_heads, cos.shape[0]),
        (*strides, size, half, tile, packed, pdl),
        warps=warps,
        pdl=pdl,
    )
    return q_out, k_out


def _packable(x: torch.Tensor) -> bool:
    """Whether a pair of channels is one aligned 32-bit word everywhere."""
    b, t, n, d = x.stride()
    return x.element_size() == 2 and d == 1 and not (b | t | n) & 1 and x.data_ptr() % 4 == 0


def _check_interleaved(q, k, cos_cache, sin_cache, position_ids) -> None:
    name = "triton_rope_on_interleaved_qk_inputs"
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise ValueError(
            f"{name}: q [B, S, N, D] and k [B, S, Nkv, D] with an even D, got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if q.shape[2] < k.shape[2]:
        raise ValueError(f"{name}: q must have at least as many heads as k, got {q.shape[2]} and {k.shape[2]}")
    if position_ids.shape != q.shape[:2]:
        raise ValueError(f"{name}: position_ids must be {tuple(q.shape[:2])}, got {tuple(position_ids.shape)}")
    if cos_cache.shape != sin_cache.shape or cos_cache.dim() != 2 or cos_cache.shape[1] != q.shape[3]:
        raise ValueError(
            f"{name}: cos_cache and sin_cache must be [positions, {q.shape[3]}], got {tuple(cos_cache.shape)}, "
            f"{tuple(sin_cache.shape)}"
        )
