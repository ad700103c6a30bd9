"""Mixture of experts with given routing and 4-bit weights that stay so, for tokens of which few meet at an expert.

Grouping -> first products with their activation -> second products -> weighted sum, as `grouped.py`; each block of
tokens unpacks its expert's weights. For still more tokens plain copies of all weights of a layer are faster, and for a
token or a few `decode.py`. Not a registered operator: the runtime's layers call it directly. CUDA (compute capability
8.0), or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.moe.int4_kernels import grouped_int4
from shardwise.ops.moe.routing import Routing, combine, most_blocks, routed
from shardwise.ops.quantization.int4_weight import SLAB, Int4Stack, tile_columns
from shardwise.ops.triton_support import dependent_launch, interpreting, triton
from shardwise.ops.workspace import Workspace

PAIRS_OF_EXPERT = 32
"""Pairs of a token and an expert for each expert of a model, up to which these products serve: of Qwen3-30B-A3B they
take 553 us then (512 tokens, H200), plain copies 900."""


@dataclass(frozen=True)
class Tile:
    """Shape of a launch."""

    slabs: int
    """Of a program; of the first product half of them ups."""
    warps: int
    """At least 4, which take tiles of K in turn."""
    deep: int
    """Tiles of K that each warp has on their way."""

    def constants(self, weight: Int4Stack) -> dict[str, Any]:
        """Of a kernel that multiplies with such weights, and how it is launched."""
        tiles = weight.shape[2] // tile_columns(weight.weight.group)
        return dict(
            S=self.slabs, W=self.warps, DEEP=min(self.deep, tiles), GROUP=weight.weight.group,
            HALF=weight.weight.scale_dtype == torch.float16, INTERPRET=interpreting(),
        )  # fmt: skip


TILES = {8: Tile(2, 4, 4), 16: Tile(2, 4, 2), 32: Tile(2, 4, 2)}
"""By tokens of a block."""
_grouped = Launcher(grouped_int4)


def grouped_int4_experts(
    x: Tensor,  # [T, H], contiguous
    ids: Tensor,  # int [T, K], local; others are skipped
    weights: Tensor,  # [T, K]
    up_gate: Int4Stack,  # [E, 2I, H], up rows before gate rows
    down: Int4Stack,  # [E, H, I]
    *,
    block: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Routed sum [T, H] in x's dtype, SiLU between the products."""
    pairs, (experts, hidden, size) = ids.numel(), down.shape
    block = block or next((each for each in TILES if pairs <= each * experts), max(TILES))
    space = Workspace.of(x.device, x.shape[0])
    routing = routed(space, ids, weights, experts, block)
    inner = space.take("inner", (pairs, size), x.dtype)
    values = space.take("values", (1, pairs, hidden), torch.float32)
    tile = tile or TILES[block]
    _launch(x, up_gate, inner, routing, block, tile, gated=True)
    _launch(inner, down, values[0], routing, block, tile, gated=False)
    return combine(values, routing, x.dtype)


def _launch(x: Tensor, weight: Int4Stack, out: Tensor, routing: Routing, block: int, tile: Tile, gated: bool) -> None:
    (pairs, rows), columns = out.shape, x.shape[1]
    device, pdl = x.device, dependent_launch(x.device)
    constants = dict(TOP_K=routing.ids.shape[1], GATED=gated, BT=block, **tile.constants(weight), PDL=pdl)
    pointers = (x, weight.words, weight.weight.scales, out, routing.order, routing.blocks)
    per = tile.slabs // 2 if gated else tile.slabs
    _grouped(
        device,
        (x.dtype, out.dtype, rows, columns, aligned(*pointers), *constants.values()),
        (most_blocks(pairs, routing.local, block), triton.cdiv(rows // SLAB, per), 1),
        (*pointers, rows, columns, *constants.values()),
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
