"""One decode step of latent attention over a paged cache of latents: append, absorb, attend, join, release.

Not a registered operator: the runtime's fused decode step calls it directly. Four launches: the weight's keys are
absorbed into the queries while the new key is normed, rotated and appended; attention reads every latent once for up to
64 heads; parts of a sequence are joined; and the weight's values are taken out of the attended latents. Nothing waits
for the device and no launch depends on lengths, so one CUDA graph serves sequences of any.

Attention has two kernels with the same shares and parts: `ring_kernel` for 16-bit numbers on Hopper, with Triton 3.6,
and `attend_kernel`.

bf16, fp16 or float32, float32 softmax and sums. CUDA only, or Triton's interpreter.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.gluon_support import ROLES, swizzled_tiles
from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.mla.absorb import Factor, Rows, head_product, tile_for
from shardwise.ops.mla.decode_kernels import absorb_kernel, attend_kernel, join_kernel
from shardwise.ops.mla.decode_ring import ring_kernel
from shardwise.ops.triton_support import asynchronous_products, interpreting, multiprocessors, triton

MOST_SEQUENCES = 128
_NAME = "latent_decode_attention"
_ring = Launcher(ring_kernel)
_RING_WIDTHS = (512, 64)
"""Of latents and rotated parts: the rings of `ring_for` fill a multiprocessor's shared memory with these."""
_MOST_PROGRAMS = 3
"""Of a tile"""
_MOST_PARTS = 64
"""Of a sequence on average: with 256 of them one sequence of 8,192 tokens took 77 µs, most of it to join them."""
_JOIN_PER_SM, _JOIN_WARPS = 32, 2
"""Programs that join, of a multiprocessor, and warps of each"""


class Tile(NamedTuple):
    """What a program of attention multiplies at a time: so many heads by a block of keys."""

    heads: int
    keys: int
    warps: int
    stages: int
    programs: int = 1
    """Of a multiprocessor at once"""


def tile_for_heads(heads: int, itemsize: int, page_size: int) -> Tile:
    """Of an H200. Two programs of a multiprocessor read while the other multiplies: 64 sequences of 4,096 tokens, 16
    heads, took 113 µs in blocks of 32 keys and 152 in blocks of 64, of which only one program fits."""
    if itemsize > 2:  # products on the plain cores, whose operands lie in registers
        return Tile(16, min(16, page_size), 8, 2)
    if heads <= 16:
        return Tile(16, min(32, page_size), 4, 6, programs=2)
    return Tile(32 if heads <= 32 else 64, min(64, page_size), 8, 2)


class Ring(NamedTuple):
    """How a program of `ring_kernel` shares out its multiprocessor: the kernel's parameters of these names."""

    heads: int
    wide: bool
    slots: int
    turned: int
    buffers: int
    score_registers: int
    value_registers: int

    @property
    def keys(self) -> int:
        return 64

    @property
    def programs(self) -> int:
        return 1


def ring_for(heads: int) -> Ring:
    """As many tiles as fit in a multiprocessor beside the queries."""
    if heads <= 16:
        return Ring(16, False, 11, 3, 2, 152, 152)
    return Ring(32, False, 10, 2, 2, 168, 152) if heads <= 32 else Ring(64, True, 8, 2, 1, 152, 168)


def plan_for(heads: int, pool: Tensor, rank: int) -> Tile | Ring:
    """What attention of so many heads to a cache takes: the ring where it can run. For all heads (16 to 128), sequences
    (1 to 128) and lengths tried on an H200 it took 37 to 90 % of the tiles' time."""
    page_size, rope = pool.shape[1], pool.shape[2] - rank
    hopper = ROLES and asynchronous_products(pool.device)
    if hopper and pool.element_size() == 2 and not page_size % 64 and (rank, rope) == _RING_WIDTHS:
        return ring_for(heads)
    return tile_for_heads(heads, pool.element_size(), page_size)


@dataclass(frozen=True)
class LatentWorkspace:
    """What `latent_decode_attention` keeps between calls; one per stream, shared by all layers of N heads, C wide."""

    parts: Tensor
    logs: Tensor

    @staticmethod
    def create(batch: int, heads: int, rank: int, device: torch.device) -> "LatentWorkspace":
        """For up to `batch` sequences."""
        rows = _MOST_PROGRAMS * multiprocessors(device) + batch
        return LatentWorkspace(
            torch.empty(rows, heads, rank, dtype=torch.float32, device=device),
            torch.empty(rows, heads, dtype=torch.float32, device=device),
        )


def reason_against(nope: int, rank: int, rope: int) -> str:
    """Why the kernels cannot serve heads of P = `nope`, C = `rank`, R = `rope`; empty when they can."""
    if nope % 16:
        return f"heads of {nope} elements without rotation, need a multiple of 16"
    for name, size in (("latents", rank), ("rotated parts", rope)):
        if not 16 <= size <= 512 or size & (size - 1):
            return f"{name} of {size} elements, need a power of two from 16 to 512"
    return ""


def latent_decode_attention(
    q: Tensor,  # [T, N (P + R)], a head's part without rotation before the rotated one; rows may be strided
    key: Tensor,  # [T, C + R], the latent before the rotated part; rows may be strided
    key_up: Tensor,  # [N, P, C]
    value_up: Tensor,  # [N, C, Dv]
    pool: Tensor,  # [pages, page_size, C + R]
    page_table: Tensor,  # int32 [rows, max_pages]
    slots: Tensor,  # int32 [T]: each sequence's row of the page table
    positions: Tensor,  # int32 [T]: keys already cached; negative marks a padding row, which yields zeros
    workspace: LatentWorkspace,
    *,
    scale: float,
    norm: Tensor | None = None,  # [C], of the latent; None: it is normed already
    eps: float = 1e-6,
    rope: Tensor | None = None,  # float32 [max_position, R]: cos of the first half, then sin; None: rotated already
    tile: Tile | Ring | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of one new token a sequence, T from 1 to MOST_SEQUENCES; its key is appended. Returns [T, N Dv].

    page_size a multiple of 64, or a smaller power of two. What a page holds behind a sequence's last key is not read.

    `pdl`: the kernels may read positions before those launched in front of them have ended.
    """
    tokens, (heads, nope, rank), width = q.shape[0], key_up.shape, pool.shape[2]
    tile = tile or plan_for(heads, pool, rank)
    _check(q, key, key_up, pool, workspace, tile)
    pdl = pdl and not interpreting()
    query = q.new_empty(tokens, heads, width)
    product = tile_for(tokens, heads, nope)
    columns, chunk = min(product.columns, rank), math.gcd(nope, 128)  # a power of two, 16 at least
    absorb_kernel[(heads * (rank // columns) + tokens,)](
        q, key, key_up, norm, rope, pool, page_table, slots, positions, query,
        tokens, eps, q.stride(0), key.stride(0), page_table.shape[1],
        N=heads, P=nope, C=rank, R=width - rank, PAGE=pool.shape[1], NORM=norm is not None, ROPE=rope is not None,
        HEADS=triton.next_power_of_2(heads), BLOCK_T=max(16, triton.next_power_of_2(tokens)), BLOCK_P=chunk,
        BLOCK_C=columns, PDL=pdl, num_warps=max(2, product.warps), launch_pdl=pdl,
    )  # fmt: skip
    attended = attend(query, pool, page_table, slots, positions, workspace, tile=tile, rank=rank, scale=scale, pdl=pdl)
    out = q.new_empty(tokens, heads * value_up.shape[2])
    _release(q, tokens, *value_up.shape)(attended, value_up, out)
    return out


def attend(
    query: Tensor,  # [B, N, C + R]
    pool: Tensor,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    workspace: LatentWorkspace,
    *,
    tile: Tile | Ring,
    rank: int,
    scale: float,
    pdl: bool,
) -> Tensor:
    """Attention alone, to cached keys up to and with the one at `positions`: [B, N, C]."""
    sequences, heads, width = query.shape
    tiles = triton.cdiv(heads, tile.heads)
    programs = max(1, min(tile.programs * multiprocessors(query.device) // tiles, _MOST_PARTS * sequences))
    pdl = pdl and not interpreting()
    out = query.new_empty(sequences, heads, rank)
    common = dict(
        N=heads, C=rank, BLOCK=tile.keys, SEQUENCES=max(2, triton.next_power_of_2(sequences)), PDL=pdl, launch_pdl=pdl
    )  # fmt: skip
    if isinstance(tile, Ring):
        _attend_by_ring(query, pool, page_table, slots, positions, out, workspace, programs, tile, rank, scale, pdl)
    else:
        attend_kernel[(tiles, programs)](
            query, pool, page_table, slots, positions, out, workspace.parts, workspace.logs, sequences, programs,
            scale * math.log2(math.e), page_table.shape[1],
            R=width - rank, PAGE=pool.shape[1], HEADS=tile.heads, STAGES=tile.stages,
            num_warps=tile.warps, **common,
        )  # fmt: skip
    columns, parts = (128, 32) if sequences * heads < multiprocessors(query.device) else (512, 4)
    columns = min(columns, rank)
    rows = min(heads * (rank // columns), max(1, _JOIN_PER_SM * multiprocessors(query.device) // sequences))
    join_kernel[(sequences, rows)](
        positions, out, workspace.parts, workspace.logs, sequences, programs, BLOCK_C=columns, PARTS=parts,
        num_warps=_JOIN_WARPS, **common,
    )  # fmt: skip
    return out


def _attend_by_ring(
    query: Tensor, pool: Tensor, page_table: Tensor, slots: Tensor, positions: Tensor, out: Tensor,
    workspace: LatentWorkspace, programs: int, ring: Ring, rank: int, scale: float, pdl: bool,
) -> None:  # fmt: skip
    sequences, heads, width = query.shape
    constants = (rank, width - rank, pool.shape[1], *ring, pdl)
    plain = (page_table, slots, positions, out, workspace.parts, workspace.logs)
    key = query.dtype, constants, aligned(*plain)
    _ring(
        query.device, key, (triton.cdiv(heads, ring.heads), programs, 1),
        (swizzled_tiles(query.view(-1, width), ring.heads, 64), swizzled_tiles(pool, 1, 64, 64), *plain)
        + (sequences, programs, scale * math.log2(math.e), page_table.shape[1], heads, *constants),
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def _release(like: Tensor, tokens: int, heads: int, rank: int, value: int):
    """The product that takes values out of attended latents."""
    rows, result = Rows(heads * rank, rank), Rows(heads * value, value)
    return head_product(like, tokens, heads, rank, value, rows, Factor(0, rank * value, value, 1), result)


def _check(q: Tensor, key: Tensor, key_up: Tensor, pool: Tensor, workspace: LatentWorkspace, tile: Tile | Ring) -> None:
    heads, nope, rank = key_up.shape
    page_size, width = pool.shape[1:]
    reason = reason_against(nope, rank, width - rank)
    if reason:
        raise ValueError(f"{_NAME}: {reason}")
    if not 1 <= q.shape[0] <= min(MOST_SEQUENCES, workspace.logs.shape[0]):
        raise ValueError(f"{_NAME}: {q.shape[0]} sequences; legal: 1 to {MOST_SEQUENCES}, as many as the workspace has")
    if q.shape[1] != heads * (nope + width - rank) or key.shape[1] != width or q.stride(1) != 1 or key.stride(1) != 1:
        raise ValueError(
            f"{_NAME}: queries {tuple(q.shape)} and keys {tuple(key.shape)} with strides {q.stride()} and "
            f"{key.stride()}; legal: contiguous rows of {heads} heads of {nope} + {width - rank}, and of {width}"
        )
    if page_size % tile.keys or not pool.is_contiguous() or not key_up.is_contiguous():
        raise ValueError(
            f"{_NAME}: pages of {page_size} tokens, need a multiple of {tile.keys}; cache and weights contiguous"
        )
