"""Tiles of the Triton attention kernels against one another on one GPU, for `shardwise/ops/attention/tiles.py`.

    python benchmarks/tune_attention.py {decode,prefill}

Prints microseconds and TB/s (decode) or TFLOPS (prefill) of every tile at every shape. A tile that does not fit the
device is printed with its error.
"""

import argparse
from unittest import mock

import torch
from ops_attention import HEADS, KV_HEADS, SIZE, Batch, Pool, triton_calls

from shardwise.ops.attention import tiles, triton
from shardwise.ops.attention.tiles import Tile
from shardwise.ops.bench.measure import alternating_microseconds

DECODE_SHAPES = [Batch(1, 1024, 1), Batch(1, 8192, 1), Batch(1, 32768, 1), Batch(8, 8192, 1), Batch(24, 4096, 1),
                 Batch(32, 1024, 1), Batch(32, 8192, 1)]  # fmt: skip
DECODE_TILES = [(64, 4, 3), (64, 4, 2), (64, 4, 4), (32, 4, 4), (32, 2, 4), (128, 4, 2), (128, 8, 2), (64, 8, 3)]
PROGRAMS_ON_AN_SM = (1, 2, 3, 4)
PREFILL_SHAPES = [Batch(1, 1024, 1024), Batch(1, 4096, 4096), Batch(1, 16384, 16384), Batch(8, 1024, 1024),
                  Batch(1, 16384, 2048)]  # fmt: skip
PREFILL_TILES = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 4), (64, 64, 4, 3), (64, 128, 4, 2)]


def microseconds_of(calls, repeats: int) -> float:
    return alternating_microseconds({"triton": calls}, repeats=repeats)["triton"]


def decode(shape: Batch, pool: Pool) -> str:
    microseconds = microseconds_of(triton_calls(shape, pool), 9)
    return f"{microseconds:8.1f} ({4 * shape.batch * shape.length * KV_HEADS * SIZE / microseconds / 1e6:4.2f})"


def prefill(shape: Batch, pool: Pool) -> str:
    microseconds = microseconds_of(triton_calls(shape, pool, 1), 7)
    pairs = shape.batch * (shape.new * (shape.new + 1) // 2 + shape.new * (shape.length - shape.new))
    return f"{microseconds:8.1f} ({4 * pairs * HEADS * SIZE / microseconds / 1e6:4.0f})"


def row(name: str, shapes: list[Batch], measure, pool: Pool) -> None:
    triton._PLANS.clear()
    tiles.choose_splits.cache_clear()
    try:
        print(f"{name:34}", *(measure(shape, pool) for shape in shapes), flush=True)
    except Exception as error:  # a tile too large for the device: the others go on
        print(f"{name:34} {type(error).__name__}: {str(error)[:80]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("decode", "prefill"))
    kernel = parser.parse_args().kernel
    torch.manual_seed(0)
    pool = Pool(32 * 8192 * KV_HEADS * SIZE * 2)
    shapes = DECODE_SHAPES if kernel == "decode" else PREFILL_SHAPES
    print(f"{'keys x warps x stages':34}", *(f"{s.batch}x{s.length} new {s.new}" for s in shapes))
    if kernel == "prefill":
        for sizes in PREFILL_TILES:
            with mock.patch.object(tiles, "prefill_tile", lambda *_, sizes=sizes: Tile(*sizes)):
                row(str(sizes), shapes, prefill, pool)
        return
    for sizes in DECODE_TILES:
        for programs in PROGRAMS_ON_AN_SM:
            with (
                mock.patch.object(tiles, "decode_tile", lambda *_, sizes=sizes: Tile(16, *sizes)),
                mock.patch.object(tiles, "FILL", programs),
            ):
                row(f"{sizes}, {programs} programs an SM", shapes, decode, pool)


if __name__ == "__main__":
    main()
