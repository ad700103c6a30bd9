"""Rotary position embeddings by the Triton kernels of `kernels.py`.

What follows from shapes, strides and dtypes is found out once and remembered: it would cost more than the launch. A
plan takes `dtypes` as part of its key, whether it reads them or not: Triton compiles for every type anew.
"""

import functools
from typing import NamedTuple

import torch

from shardwise.ops.devices import one_device
from shardwise.ops.kernel_launch import Form, Kernel
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.rope.kernels import flat_kernel, halves_kernel, interleaved_kernel
from shardwise.ops.rope.reference import contiguous_pair
from shardwise.ops.triton_support import dependent_launch

LAYOUTS = ("bsnd", "bnsd", "sbnd", "snbd", "nbsd", "nsbd")
_halves, _flat, _interleaved = Kernel(halves_kernel), Kernel(flat_kernel), Kernel(interleaved_kernel)
_remembered = functools.lru_cache(maxsize=4096)


class _Plan(NamedTuple):
    """A form of a kernel, and the grid and numbers that it is launched with."""

    form: Form
    grid: tuple[int, int, int]
    free: tuple[int, ...]


def _tile(size: int, heads: int, tokens: int) -> tuple[int, int, int]:
    """(elements of a half, heads of a tile, warps): 16 elements of each half a thread; short batches are spread out.

    For interleaved inputs. By sweeps on an H200 at 32 heads of 128, of a copy's speed: at 1024 tokens tiles of 16 heads
    97 %, of 32 heads 83 to 89 %; at 2048 102 % both; tiles of 4 heads 42 %.
    """
    half, rows = _half(size), tokens * heads
    most = max(1, (2048 if rows >= 65536 else 1024 if rows >= 8192 else 256) // half)
    tile = min(1 << (heads - 1).bit_length(), most)
    return half, tile, max(1, min(8, half * tile // 512)) if most > 4 else 2


def _halves_tile(size: int, heads: int, tokens: int) -> tuple[int, int, int]:
    """As `_tile`, where halves are turned: 1024 elements of each half, twice that while the L2 cache holds most of it
    all and the device is full. A thread for each of a token's sines and cosines: with fewer, Triton lays the rows out
    as it does the table and moves them through shared memory.

    By a sweep on an H200 at 32 heads of 128, µs with 16 and 32 heads: 512 tokens 2.7 and 2.9, 1024 3.9 and 3.75, 2048
    7.0 and 6.1, 4096 17.9 and 18.0, 16384 68.6 and 70.6. Fewer heads gain at one token alone (0.04 µs).
    """
    half, most = _half(size), 2048 if 32768 <= tokens * heads < 131072 else 1024
    return half, min(1 << (heads - 1).bit_length(), max(1, most // half)), max(4, half // 16)


def _half(size: int) -> int:
    return 1 << (size // 2 - 1).bit_length()


def _positions(name: str, freqs_shape: torch.Size, size: int) -> int:
    """Positions of a table [positions, D/2, 2] or [1, positions, D/2, 2]."""
    table = freqs_shape[1:] if len(freqs_shape) == 4 and freqs_shape[0] == 1 else freqs_shape
    if size % 2 or len(table) != 3 or table[1:] != (size // 2, 2):
        raise ValueError(
            f"{name}: freqs_cis must be [positions, D/2, 2] for an even D = {size}, got {tuple(freqs_shape)}"
        )
    return table[0]


def _check_types(name: str, values: tuple[torch.dtype, ...], places: tuple[torch.dtype, ...]) -> None:
    """TypeError unless values and angles are floating point, positions and lengths integers."""
    whole = all(dtype in (torch.int32, torch.int64) for dtype in places)
    if not whole or not all(dtype.is_floating_point for dtype in values):
        came = ", ".join(str(dtype) for dtype in (*values, *places))
        raise TypeError(f"{name}: came {came}; legal: floating point, and int32 or int64 for positions and lengths")


class _Halves(NamedTuple):
    plan: _Plan
    batch: int
    copy_x: bool
    """Whether x must be made contiguous first, and the result given x's strides last: its channels lie apart."""


@_remembered
def _plan_halves(layout, shape, strides, freqs_shape, dtypes, devices) -> _Halves:
    name = "triton_rope_with_input_pos"
    device = one_device(name, *devices)
    _check_types(name, dtypes[:2], dtypes[2:])
    if layout not in LAYOUTS or len(shape) != 4:
        raise ValueError(f"{name}: x must have 4 dimensions in one of {LAYOUTS}, got {tuple(shape)}, {layout!r}")
    b, s, n = (layout.index(axis) for axis in "bsn")
    batch, tokens, heads, size = shape[b], shape[s], shape[n], shape[3]
    positions = _positions(name, freqs_shape, size)
    half, tile, warps = _halves_tile(size, heads, batch * tokens)
    # The strides of the result, which is made like x.
    out_strides = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    copy = strides[3] != 1 or out_strides[3] != 1
    if copy:
        strides = out_strides = torch.empty(shape, device="meta").stride()
    fixed = (*(strides[d] for d in (b, s, n)), *(out_strides[d] for d in (b, s, n)), size, half, tile)
    pdl = dependent_launch(device)
    form = _halves.form(device, (*fixed, pdl), warps=warps, pdl=pdl)
    grid = (batch * tokens * -(-heads // tile), 1, 1)
    return _Halves(_Plan(form, grid, (tokens, heads, positions)), batch, copy)


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
    dtypes = (x.dtype, freqs_cis.dtype, torch.int32 if input_pos is None else input_pos.dtype)
    devices = (x.device, freqs_cis.device, x.device if input_pos is None else input_pos.device)
    plan, batch, copy = _plan_halves(layout, x.shape, x.stride(), freqs_cis.shape, dtypes, devices)
    if input_pos is None:
        input_pos = torch.zeros(batch, dtype=torch.int32, device=x.device)
    elif input_pos.numel() < batch:
        raise ValueError(
            f"triton_rope_with_input_pos: input_pos holds {input_pos.numel()} positions for {batch} batch rows"
        )
    out = torch.empty_like(x)
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if copy else out
    if copy:
        x = x.contiguous()
    plan.form(plan.grid, (x, result, freqs_cis.contiguous(), input_pos.contiguous()), plan.free)
    return out.copy_(result) if copy else out


@_remembered
def _plan_flat(shape, freqs_shape, sequences, dtypes, devices) -> _Plan:
    name = "triton_rope_on_flattened_inputs"
    device, (tokens, heads, size) = one_device(name, *devices), shape
    _check_types(name, dtypes[:2], dtypes[2:])
    positions = _positions(name, freqs_shape, size)
    half, tile, warps = _halves_tile(size, heads, tokens)
    block = min(256, 1 << max(sequences - 1, 0).bit_length())
    pdl = dependent_launch(device)
    form = _flat.form(device, (size, half, tile, block, sequences > block, pdl), warps=warps, pdl=pdl)
    return _Plan(form, (tokens * -(-heads // tile), 1, 1), (heads, positions, sequences))


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
    read = x, freqs_cis, input_pos, seq_lens, seq_start_indices
    dtypes, devices = tuple(each.dtype for each in read), tuple(each.device for each in read)
    plan = _plan_flat(x.shape, freqs_cis.shape, sequences, dtypes, devices)
    out = torch.empty_like(x)
    metadata = input_pos.contiguous(), seq_lens.contiguous(), seq_start_indices.contiguous()
    plan.form(plan.grid, (x, out, freqs_cis.contiguous(), *metadata), plan.free)
    return out


@_remembered
def _plan_interleaved(q_shape, k_shape, q_strides, k_strides, tables, even, dtypes, devices) -> _Plan:
    device = one_device("triton_rope_on_interleaved_qk_inputs", *devices)
    _check_types("triton_rope_on_interleaved_qk_inputs", dtypes[:4], dtypes[4:])
    _check_interleaved(q_shape, k_shape, *tables)
    batch, tokens, heads, size = q_shape
    k_heads = k_shape[2]
    half, tile, warps = _tile(size, heads, batch * tokens)
    packed = even and all(_pairs_are_words(strides) and dtype.itemsize == 2
                          for strides, dtype in zip((q_strides, k_strides), dtypes, strict=False))  # fmt: skip
    pdl = dependent_launch(device)
    blocks = -(-heads // tile)
    k_tile = 1 << (-(-k_heads // blocks) - 1).bit_length()
    fixed = (*q_strides, *k_strides, size, half, tile, k_tile, packed, pdl)
    form = _interleaved.form(device, fixed, warps=warps, pdl=pdl)
    return _Plan(form, (batch * tokens, blocks, 1), (tokens, heads, k_heads, tables[0][0]))


def _pairs_are_words(strides: tuple[int, ...]) -> bool:
    """Whether pairs of channels are words of twice the size, aligned if the first one is."""
    return strides[3] == 1 and not any(stride & 1 for stride in strides[:3])


@operator(fake=contiguous_pair, needs=(TRITON,), instead="torch_rope_with_qk_interleaving")
def triton_rope_on_interleaved_qk_inputs(
    q: torch.Tensor, k: torch.Tensor, cos_cache: torch.Tensor, sin_cache: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's form: channel pairs (2i, 2i+1) are turned and land at (i, i + D/2). Results contiguous.

    q [B, S, N, D], k [B, S, Nkv, D], any strides; cos_cache, sin_cache [positions, D], halves duplicated;
    position_ids int [B, S].
    """
    plan = _plan_interleaved(
        q.shape, k.shape, q.stride(), k.stride(), (cos_cache.shape, sin_cache.shape, position_ids.shape),
        (q.data_ptr() | k.data_ptr()) % 4 == 0,
        (q.dtype, k.dtype, cos_cache.dtype, sin_cache.dtype, position_ids.dtype),
        (q.device, k.device, cos_cache.device, sin_cache.device, position_ids.device),
    )  # fmt: skip
    q_out, k_out = contiguous_pair(q, k)
    tables = cos_cache.contiguous(), sin_cache.contiguous(), position_ids.contiguous()
    plan.form(plan.grid, (q, k, q_out, k_out, *tables), plan.free)
    return q_out, k_out


def _check_interleaved(q: torch.Size, k: torch.Size, cos: torch.Size, sin: torch.Size, positions: torch.Size) -> None:
    """Shape rules; raises ValueError."""
    name = "triton_rope_on_interleaved_qk_inputs"
    if len(q) != 4 or len(k) != 4 or q[:2] != k[:2] or q[3] != k[3] or q[3] % 2:
        raise ValueError(f"{name}: q [B, S, N, D] and k [B, S, Nkv, D] with an even D, got {tuple(q)}, {tuple(k)}")
    if q[2] < k[2]:
        raise ValueError(f"{name}: q must have at least as many heads as k, got {q[2]} and {k[2]}")
    if positions != q[:2]:
        raise ValueError(f"{name}: position_ids must be {tuple(q[:2])}, got {tuple(positions)}")
    if cos != sin or len(cos) != 2 or cos[1] != q[3]:
        raise ValueError(f"{name}: cos_cache and sin_cache must be [positions, {q[3]}], got {tuple(cos)}, {tuple(sin)}")
