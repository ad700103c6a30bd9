"""Latent attention of many new tokens a sequence: keys and values are expanded from the latents, a few heads at a time.

Not a registered operator: the runtime calls it directly. A query and a key take P + R + Dv = 320 multiplications in
DeepSeek's sizes, where queries that have absorbed the weight take 2 C + R = 1088; expanding a latent costs each of its
tokens' heads C (P + Dv) of them, as much as some 400 queries. What is expanded at once is bounded, and scores stay on
the chip. bf16, fp16 or float32, float32 softmax and sums. CUDA only, or Triton's interpreter.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.mla.prefill_kernel import prefill_kernel
from shardwise.ops.triton_support import interpreting

EXPANDED_BYTES = 256 << 20
"""Of keys and values at once, but those of one head at least."""


class Tile(NamedTuple):
    """Queries and keys of a program's products."""

    queries: int
    keys: int
    warps: int
    stages: int


class Run(NamedTuple):
    """Consecutive queries of one sequence."""

    query: int
    """The first"""
    queries: int
    key: int
    """Where the sequence's keys begin"""
    past: int
    """Its keys before those of these queries"""


def tile_for(queries: int, itemsize: int) -> Tile:
    """`queries` of a sequence on average: the least tile of a warp group's product where they fill no larger one."""
    if itemsize > 2:  # products on the plain cores, whose operands lie in registers
        return Tile(16, 16, 4, 1)
    return Tile(64, 64, 4, 3) if queries <= 64 else Tile(128, 64, 8, 3)


def runs_in_tiles(runs: Iterable[Run], queries: int) -> list[Run]:
    """Runs of at most so many, those that see the most keys first, so that none of them is left to the end."""
    tiles = [
        Run(run.query + at, min(queries, run.queries - at), run.key, run.past + at)
        for run in runs
        for at in range(0, run.queries, queries)
    ]
    return sorted(tiles, key=lambda tile: -(tile.past + tile.queries))


def reason_against(nope: int, rope: int, value: int) -> str:
    """Why the kernel cannot serve heads of P = `nope`, R = `rope`, Dv = `value`; empty when it can."""
    for name, size in (("parts without rotation", nope), ("rotated parts", rope), ("values", value)):
        if not 16 <= size <= 256 or size & (size - 1):
            return f"{name} of {size} elements, need a power of two from 16 to 256"
    return ""


def latent_prefill_attention(
    q: Tensor,  # [T, N, P + R], rotated; tokens may be strided
    latents: Tensor,  # [S, C + R], normed and rotated: all that the sequences see, one sequence behind the other
    key_up: Tensor,  # [N, P, C]
    value_up: Tensor,  # [N, C, Dv]
    tiles: Tensor,  # int32 [tiles, 4], `runs_in_tiles`
    tile: Tile,
    *,
    scale: float,
    pdl: bool = False,
) -> Tensor:
    """Causal attention of the runs' queries: [T, N, Dv]."""
    (heads, nope, rank), value, keys = key_up.shape, value_up.shape[2], latents.shape[0]
    rope = latents.shape[1] - rank
    reason = reason_against(nope, rope, value)
    if reason:
        raise ValueError(f"latent_prefill_attention: {reason}")
    if q.stride()[1:] != (nope + rope, 1) or not latents.is_contiguous():
        raise ValueError(
            f"latent_prefill_attention: queries {tuple(q.shape)} with strides {q.stride()}, latents with "
            f"{latents.stride()}; legal: contiguous heads of {nope + rope} elements, contiguous latents"
        )
    out = q.new_empty(q.shape[0], heads, value)
    pdl = pdl and not interpreting()
    for part in _groups(heads, keys * (nope + value) * q.element_size()):
        count = part.stop - part.start
        seen = latents[:, :rank].expand(count, keys, rank)
        prefill_kernel[(len(tiles) * count,)](
            q[:, part], torch.bmm(seen, key_up[part].transpose(1, 2)), latents, torch.bmm(seen, value_up[part]),
            out[:, part], tiles, scale * math.log2(math.e), keys, q.stride(0), out.stride(0),
            HEADS=count, P=nope, C=rank, R=rope, DV=value, ROWS=tile.queries, KEYS=tile.keys, PDL=pdl,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
    return out


def _groups(heads: int, nbytes: int) -> Sequence[slice]:
    """Heads that are expanded at once, of `nbytes` each."""
    size = max(1, min(heads, EXPANDED_BYTES // max(1, nbytes)))
    return [slice(start, min(start + size, heads)) for start in range(0, heads, size)]
