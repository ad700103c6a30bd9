"""Products with weights that stay 4-bit beside bf16 ones: Llama-3.1-8B's layers in groups of 128, on one GPU.

    python benchmarks/int4_weights.py --json FILE            # as the runtime runs them
    python benchmarks/int4_weights.py --sweep --json FILE    # the fastest tiles of each product instead

Each time is that of one launch among several in a graph with dependent launch, over as many weights as do not fit the
L2 cache. bf16 is what the runtime runs for such weights: a product of one token by `skinny_linear`, others by cuBLAS
with the activation behind gated ones. `bytes_us` is what the 4-bit weights take at a plain copy's rate. For many
tokens a 4-bit weight becomes a plain matrix first.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from float8_weights import FOOTPRINT, difference, show, write
from torch import Tensor

from shardwise.ops.bench.measure import several_microseconds
from shardwise.ops.linear.decode import gated_activation, skinny_linear
from shardwise.ops.linear.int4 import Tile, few_int4
from shardwise.ops.linear.int4_many import FEW, MAX_MANY, ManyTile, int4_product, many_int4
from shardwise.ops.quantization.int4_weight import Int4Weight, pack_int4
from shardwise.parallel.traffic import copy_bandwidth

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
GROUP = 128


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    """Of each half where gated."""
    columns: int
    gated: bool = False
    normed: bool = False
    """One token comes with its norm."""

    @property
    def stored_rows(self) -> int:
        return 2 * self.rows if self.gated else self.rows


SHAPES = [
    Shape("llama-8b qkv", 6144, 4096, normed=True),
    Shape("llama-8b out", 4096, 4096),
    Shape("llama-8b gate and up", 14336, 4096, gated=True, normed=True),
    Shape("llama-8b down", 4096, 14336),
]


def int4(rows: int, columns: int) -> Int4Weight:
    groups = columns // GROUP
    codes, zeros = (torch.randint(0, 16, (rows, n), dtype=torch.uint8, device="cuda") for n in (columns, groups))
    scales = (0.5 + torch.rand(rows, groups, device="cuda")) * columns**-0.5 / 8
    return pack_int4(codes, scales.half(), zeros)


def tiles(tokens: int, shape: Shape) -> list[Tile | ManyTile]:
    if tokens > FEW:
        shapes = ((64, 4, 4), (64, 4, 3), (128, 8, 3)) if tokens <= 64 else ((64, 4, 4), (128, 8, 3))
        return [ManyTile(rows, min(128, tokens), *rest, n) for (rows, *rest), n in product(shapes, (1, 2, 4))]
    if tokens > 16:
        slabs, warps = (2,) if shape.gated else (1, 2), ((4, 2), (4, 4), (8, 4))
        return [Tile(n, *each, early=False) for n, each in product(slabs, warps)]
    shapes = [(2, 4, 2), (2, 4, 4), (2, 8, 2), (2, 8, 4)]
    if not shape.gated:
        shapes = [(1, 4, 4), (1, 4, 8), (1, 8, 2), (1, 8, 4), (2, 4, 4), (2, 8, 4)]
    return [Tile(*each) for each in shapes]


def int4_call(
    shape: Shape, x: Tensor, weight: Int4Weight, wide: Tensor, tile: Tile | ManyTile | None = None
) -> Callable:
    tokens = x.shape[0]
    if isinstance(tile, ManyTile):
        return lambda: gated(shape, many_int4(x, weight, tile=tile))
    if tile is not None or tokens == 1:
        norm = x[0] if shape.normed and tokens == 1 else None
        return lambda: few_int4(x, weight, norm_weight=norm, gated=shape.gated, tile=tile)
    if tokens <= MAX_MANY:
        return lambda: int4_product(x, weight, gated=shape.gated, pdl=True)
    return plain_call(shape, x, lambda: weight.widened(wide))


def gated(shape: Shape, both: Tensor) -> Tensor:
    return gated_activation(both, pdl=True) if shape.gated else both


def plain_call(shape: Shape, x: Tensor, weight: Callable[[], Tensor]) -> Callable:
    if x.shape[0] == 1:
        norm = x[0] if shape.normed else None
        return lambda: skinny_linear(x, weight(), norm_weight=norm, gated=shape.gated, pdl=True)
    return lambda: gated(shape, torch.nn.functional.linear(x, weight()))


def product_rows(shape: Shape, bandwidth: float, sweep: bool, counts: Sequence[int]) -> list[dict]:
    weights = [int4(shape.stored_rows, shape.columns)]
    weights += [
        Int4Weight(weights[0].words.clone(), weights[0].scales.clone(), *(weights[0].shape, GROUP, torch.float16))
        for _ in range(max(2, -(-FOOTPRINT // weights[0].nbytes)) - 1)
    ]
    plain = [
        torch.empty(weights[0].shape, dtype=torch.bfloat16, device="cuda") for _ in range(max(2, len(weights) // 4))
    ]
    for each in plain:
        weights[0].widened(each)
    rows = []
    for tokens in counts:
        x = torch.randn(tokens, shape.columns, device="cuda").bfloat16()
        row = {"shape": shape.name, "tokens": tokens, "bytes_us": weights[0].nbytes / bandwidth * 1e6}
        row["bf16_us"] = several_microseconds([plain_call(shape, x, lambda w=w: w) for w in plain])
        if sweep:
            times = [
                (several_microseconds([int4_call(shape, x, w, plain[0], tile) for w in weights]), asdict(tile))
                for tile in tiles(tokens, shape)
            ]
            row["best"] = [{"us": us, **tile} for us, tile in sorted(times, key=lambda each: each[0])[:4]]
        else:
            row["int4_us"] = several_microseconds([int4_call(shape, x, w, plain[0]) for w in weights])
        expected = plain_call(shape, x, lambda: plain[1])()
        row["difference"] = difference(int4_call(shape, x, weights[0], plain[0])(), expected)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--json")
    args = parser.parse_args()
    bandwidth = copy_bandwidth(torch.device("cuda"))
    found = []
    for shape in SHAPES:
        counts = [n for n in args.tokens if n <= MAX_MANY or not args.sweep]
        for row in product_rows(shape, bandwidth, args.sweep, counts):
            found.append(row)
            show(row)
    if args.json:
        write(args.json, bandwidth, found)


if __name__ == "__main__":
    main()
