"""Mixtures of experts with 4-bit weights beside bf16 ones: layers of Qwen3-30B-A3B and Mixtral-8x7B on one GPU.

    python benchmarks/int4_experts.py --json FILE            # as the runtime runs them
    python benchmarks/int4_experts.py --sweep --json FILE    # the fastest tiles of a token and of a few instead

Each time is that of one call among several in a graph with dependent launch, whose tokens choose experts at random, so
that together they read more than the L2 cache holds. Up to 4 tokens both forms are those of the decode step, which
choose from logits; more come with their choice. `wide_us` is what writing the layer out and bf16's products take.
`bytes_us` is what the chosen experts' codes, scales and zero points take at a plain copy's rate.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from float8_weights import FOOTPRINT, difference, show, write
from torch import Tensor

from shardwise.ops.bench.measure import several_microseconds
from shardwise.ops.moe import decode
from shardwise.ops.moe.decode import Choice, Experts, Gate, expert_down, expert_up
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.int4 import Tile, grouped_int4_experts
from shardwise.ops.quantization.int4_weight import Int4Stack, pack_int4
from shardwise.parallel.decode_moe import FEW_TOKENS
from shardwise.parallel.traffic import copy_bandwidth

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SWEPT = (1, 4, 8, 32, 128)
GROUP = 128


@dataclass(frozen=True)
class Shape:
    name: str
    experts: int
    top_k: int
    hidden: int
    size: int


SHAPES = [Shape("qwen3-30b-a3b", 128, 8, 2048, 768), Shape("mixtral-8x7b", 8, 2, 4096, 14336)]
UP_TILES = [Tile(*each) for each in ((2, 4, 2), (2, 4, 4), (2, 4, 8), (2, 8, 2), (2, 8, 4), (4, 4, 2))]
DOWN_TILES = [Tile(*each) for each in ((1, 8, 4), (1, 8, 6), (1, 8, 12), (1, 16, 6), (2, 8, 4), (2, 8, 6))]
GROUPED_TILES = [(8, Tile(2, 4, 2)), (8, Tile(2, 4, 4)), (8, Tile(2, 8, 2)), (8, Tile(4, 4, 2)), (16, Tile(2, 4, 2))]
GROUPED_TILES += [
    (16, Tile(2, 8, 2)),
    (16, Tile(2, 4, 1)),
    (32, Tile(2, 4, 2)),
    (32, Tile(2, 4, 1)),
    (32, Tile(2, 8, 1)),
]
"""And tokens of a block."""


@dataclass(frozen=True)
class Call:
    """Tokens and what they choose."""

    x: Tensor
    logits: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def random(cls, shape: Shape, tokens: int) -> "Call":
        x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
        logits = torch.randn(tokens, shape.experts, device="cuda")
        best, ids = logits.topk(shape.top_k)
        return cls(x, logits, ids.int(), best.softmax(-1))


def int4(experts: int, rows: int, columns: int) -> Int4Stack:
    groups = columns // GROUP
    rows *= experts
    codes, zeros = (torch.randint(0, 16, (rows, n), dtype=torch.uint8, device="cuda") for n in (columns, groups))
    scales = (0.5 + torch.rand(rows, groups, device="cuda")) * columns**-0.5 / 8
    return Int4Stack(pack_int4(codes, scales.half(), zeros), experts)


class Layer:
    """A layer in both forms, of the same values."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.packed = int4(shape.experts, 2 * shape.size, shape.hidden), int4(shape.experts, shape.hidden, shape.size)
        self.plain = [each.widened(empty(each)) for each in self.packed]
        self.wide = [empty(each) for each in self.packed]
        self.slots = torch.arange(shape.experts, dtype=torch.int32, device="cuda")

    def step(self, call: Call, up_gate: Experts, down: Experts) -> Tensor:
        """As the decode step."""
        choice = Choice(self.shape.top_k, True)
        routed = expert_up(call.x, call.logits, self.slots, choice, up_gate, Gate(), pdl=True)
        return expert_down(routed, down, pdl=True)

    def grouped(self, call: Call, block: int | None = None, tile: Tile | None = None) -> Tensor:
        return grouped_int4_experts(call.x, call.ids, call.weights, *self.packed, block=block, tile=tile)

    def many(self, call: Call, weights: Sequence[Tensor]) -> Tensor:
        return grouped_moe(call.x, call.ids, call.weights, *weights, "silu")

    def widened(self, call: Call) -> Tensor:
        return self.many(call, [each.widened(out) for each, out in zip(self.packed, self.wide, strict=True)])

    def bytes_of(self, call: Call) -> float:
        """Of the experts that are chosen."""
        total = sum(each.weight.nbytes for each in self.packed)
        return total * call.ids.unique().numel() / self.shape.experts


def empty(stack: Int4Stack) -> Tensor:
    return torch.empty(stack.shape, dtype=torch.bfloat16, device="cuda")


def row_of(layer: Layer, tokens: int, bandwidth: float, sweep: bool) -> dict:
    one = Call.random(layer.shape, tokens)
    count = min(16, max(2, -(-FOOTPRINT // int(layer.bytes_of(one)))))
    calls = [one, *(Call.random(layer.shape, tokens) for _ in range(count - 1))]
    read = sum(layer.bytes_of(call) for call in calls) / count
    row = {"shape": layer.shape.name, "tokens": tokens, "bytes_us": read / bandwidth * 1e6}

    def microseconds(form: Callable[[Call], Tensor]) -> float:
        return several_microseconds([lambda call=call: form(call) for call in calls])

    if sweep:
        times = [{"us": us, **tile} for us, tile in swept(layer, tokens, microseconds)]
        return row | {"tiles": sorted(times, key=lambda each: each["us"])}
    expected = layer.many(one, layer.plain)
    if tokens <= FEW_TOKENS:
        row["bf16_us"] = microseconds(lambda call: layer.step(call, *layer.plain))
        row["int4_us"] = microseconds(lambda call: layer.step(call, *layer.packed))
        row["difference"] = difference(layer.step(one, *layer.packed), expected)
    else:
        row["bf16_us"] = microseconds(lambda call: layer.many(call, layer.plain))
        row["int4_us"] = microseconds(layer.grouped)
        row["wide_us"] = microseconds(layer.widened)
        row["difference"] = difference(layer.grouped(one), expected)
    return row


def swept(layer: Layer, tokens: int, microseconds: Callable) -> Iterator[tuple[float, dict]]:
    """Times of tiles: of the decode step, one product's at once, or of grouped products."""
    if tokens > FEW_TOKENS:
        for block, tile in GROUPED_TILES:
            us = microseconds(lambda call, block=block, tile=tile: layer.grouped(call, block, tile))
            yield us, {"block": block, **asdict(tile)}
        return
    for name, tiles in (("INT4_UP_TILE", UP_TILES), ("INT4_DOWN_TILE", DOWN_TILES)):
        kept = getattr(decode, name)
        for tile in tiles:
            setattr(decode, name, tile)
            yield microseconds(lambda call: layer.step(call, *layer.packed)), {"of": name, **asdict(tile)}
        setattr(decode, name, kept)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    found = []
    for layer, tokens in product(map(Layer, SHAPES), args.tokens or (SWEPT if args.sweep else TOKENS)):
        row = row_of(layer, tokens, bandwidth, args.sweep)
        found.append(row)
        show(row)
    if args.json:
        write(args.json, bandwidth, found)


if __name__ == "__main__":
    main()
