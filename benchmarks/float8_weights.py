"""Products and experts whose weights stay float8 beside bf16 ones: DeepSeek-V3's layers and Llama-3.1-8B's, on one GPU.

    python benchmarks/float8_weights.py --json FILE            # as the runtime runs them
    python benchmarks/float8_weights.py --sweep --json FILE    # the fastest tiles of each product instead

Each time is that of one launch among several in a graph with dependent launch, over as many weights as do not fit the
L2 cache. bf16 is what the runtime runs for such weights: a product of one token by `skinny_linear`, others by cuBLAS
with the activation behind gated ones, experts by `grouped_moe`. `bytes_us` is what the float8 weights take at a plain
copy's rate.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import several_microseconds
from shardwise.ops.linear.decode import gated_activation, skinny_linear
from shardwise.ops.linear.float8 import FewTile, Tile, few_float8, skinny_float8
from shardwise.ops.moe.contract import WeightScales
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.quantization.float8 import Float8Weight
from shardwise.parallel.traffic import copy_bandwidth

FOOTPRINT = 200 << 20
TOKENS = (1, 2, 16, 64)
EXPERTS, TOP_K, HIDDEN, INNER = 64, 8, 7168, 2048
"""A fourth of DeepSeek-V3's experts, whose number sets how many a batch meets."""
EXPERT_TOKENS = (1, 2, 8, 64, 512, 4096)


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    """Of each half where gated."""
    columns: int
    gated: bool = False
    tiled: bool = True

    @property
    def stored_rows(self) -> int:
        return 2 * self.rows if self.gated else self.rows


SHAPES = [
    Shape("deepseek-v3 latents", 2112, 7168),
    Shape("deepseek-v3 queries", 24576, 1536),
    Shape("deepseek-v3 out", 7168, 16384),
    Shape("deepseek-v3 dense gate and up", 18432, 7168, gated=True),
    Shape("deepseek-v3 dense down", 7168, 18432),
    Shape("deepseek-v3 shared gate and up", 2048, 7168, gated=True),
    Shape("deepseek-v3 shared down", 7168, 2048),
    Shape("llama-8b qkv", 6144, 4096, tiled=False),
    Shape("llama-8b out", 4096, 4096, tiled=False),
    Shape("llama-8b gate and up", 14336, 4096, gated=True, tiled=False),
    Shape("llama-8b down", 4096, 14336, tiled=False),
]


def float8(*shape: int, tiled: bool) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 120, shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    *lead, rows, columns = shape
    scales = (*lead, -(-rows // 128), -(-columns // 128)) if tiled else (*lead, rows)
    return codes, torch.rand(scales, device="cuda") * columns**-0.5 / 50


def tiles(shape: Shape) -> list[Tile]:
    heights = (2, 4) if shape.gated else (2, 4, 8)
    found = [Tile(*each) for each in product(heights, (1, 2, 4))]
    found += [Tile(*each) for each in product(heights[-2:], (1, 2, 4), (3, 5))]
    found += [Tile(rows, warps, whole=True) for rows, warps in product((2, 4), (1, 2, 4)) if shape.columns <= 4096]
    return [tile for tile in found if tile.columns <= shape.columns]


def few_tiles(tokens: int, shape: Shape) -> list[FewTile]:
    rows = ((128, 4, 4), (128, 8, 4)) if shape.gated else ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 4))
    found = [FewTile(tall, 128, warps, stages, n) for (tall, warps, stages), n in product(rows, (1, 2, 4, 8))]
    return [tile for tile in found if shape.columns // 128 // tile.splits >= 2 and (tokens <= 32 or tile.stages < 6)]


def float8_call(shape: Shape, x: Tensor, weight: Float8Weight, tile: Tile | FewTile | None = None) -> Callable:
    if x.shape[0] == 1:
        return lambda: skinny_float8(x, weight, gated=shape.gated, tile=tile, pdl=True)
    return lambda: few_float8(x, weight, gated=shape.gated, tile=tile)


def plain_call(shape: Shape, x: Tensor, weight: Tensor) -> Callable:
    if x.shape[0] == 1:
        return lambda: skinny_linear(x, weight, gated=shape.gated, pdl=True)
    if shape.gated:
        return lambda: gated_activation(torch.nn.functional.linear(x, weight), pdl=True)
    return lambda: torch.nn.functional.linear(x, weight)


def product_rows(shape: Shape, bandwidth: float, sweep: bool) -> list[dict]:
    count = max(2, -(-FOOTPRINT // (shape.stored_rows * shape.columns)))
    weights = [Float8Weight(*float8(shape.stored_rows, shape.columns, tiled=shape.tiled)) for _ in range(count)]
    wide = [w.widened(torch.empty(w.shape, dtype=torch.bfloat16, device="cuda")) for w in weights[: max(2, count // 2)]]
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, shape.columns, device="cuda").bfloat16()
        row = {"shape": shape.name, "tokens": tokens, "bytes_us": weights[0].codes.nbytes / bandwidth * 1e6}
        if sweep:
            choice: Sequence[Tile | FewTile] = tiles(shape) if tokens == 1 else few_tiles(tokens, shape)
            times = [
                (several_microseconds([float8_call(shape, x, w, tile) for w in weights]), asdict(tile))
                for tile in choice
            ]
            row["best"] = [{"us": us, **tile} for us, tile in sorted(times, key=lambda each: each[0])[:4]]
        else:
            row["float8_us"] = several_microseconds([float8_call(shape, x, w) for w in weights])
            row["bf16_us"] = several_microseconds([plain_call(shape, x, w) for w in wide])
            row["difference"] = difference(float8_call(shape, x, weights[0])(), plain_call(shape, x, wide[0])())
        rows.append(row)
    return rows


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def expert_call(
    x: Tensor, ids: Tensor, weights: Tensor, first: Tensor, second: Tensor, scales: WeightScales | None = None
) -> Callable:
    return lambda: grouped_moe(x, ids, weights, first, second, "silu", scales=scales)


def expert_rows(bandwidth: float) -> list[dict]:
    (first, first_scales), (second, second_scales) = (
        float8(EXPERTS, rows, columns, tiled=True) for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    scales, wide = WeightScales(first_scales, second_scales), []
    for codes, its_scales in ((first, first_scales), (second, second_scales)):
        wide.append(torch.empty(codes.shape, dtype=torch.bfloat16, device="cuda"))
        for expert, plain in enumerate(wide[-1]):
            Float8Weight(codes[expert], its_scales[expert]).widened(plain)
    rows = []
    for tokens in EXPERT_TOKENS:
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        chosen = [torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K, 1).indices.int() for _ in range(4)]
        weights = torch.rand(tokens, TOP_K, device="cuda") / TOP_K
        packed = [expert_call(x, ids, weights, first, second, scales) for ids in chosen]
        plain = [expert_call(x, ids, weights, *wide) for ids in chosen]
        met = sum(len(ids.unique()) for ids in chosen) / len(chosen)
        row = {"shape": f"deepseek-v3 {EXPERTS} experts", "tokens": tokens}
        row["bytes_us"] = met * (first[0].nbytes + second[0].nbytes) / bandwidth * 1e6
        row |= {"float8_us": several_microseconds(packed), "bf16_us": several_microseconds(plain)}
        rows.append(row | {"difference": difference(packed[0](), plain[0]())})
    return rows


def show(row: dict) -> None:
    """Print a row, as one line of JSON."""
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}), flush=True)


def write(path: str, bandwidth: float, rows: list[dict]) -> None:
    """Write all rows, with the machine and the rate of a copy in bytes a second."""
    report = {"machine": machine_facts(), "copy_bytes_per_second": bandwidth, "rows": rows}
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    bandwidth = copy_bandwidth(torch.device("cuda"))
    found = [row for shape in SHAPES for row in product_rows(shape, bandwidth, args.sweep)]
    found += [] if args.sweep else expert_rows(bandwidth)
    for row in found:
        show(row)
    if args.json:
        write(args.json, bandwidth, found)


if __name__ == "__main__":
    main()
