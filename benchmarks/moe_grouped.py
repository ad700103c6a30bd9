"""Mixture-of-experts layers in bf16 and fp8 on one GPU, beside a loop over experts and FlashInfer's CUTLASS kernels.

    python benchmarks/moe_grouped.py [--build-peer] [--json FILE]

Layers of Qwen3-30B-A3B and Mixtral-8x7B, 1 to 8192 tokens by powers of two, routing given. FlashInfer's column appears
where its module is compiled; --build-peer compiles it first, which takes many minutes once. Floors as in moe_mxfp4.py.
"""

import argparse
from pathlib import Path

from shardwise.launch.cli import bench_moe

RESULTS = Path(__file__).parent / "results" / "moe-grouped.json"
LAYERS = ["qwen3-30b-a3b", "mixtral-8x7b", "qwen3-30b-a3b-fp8", "mixtral-8x7b-fp8"]
TOKENS = [1 << power for power in range(14)]


def main() -> None:
    """Measure the four layers and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-peer", action="store_true", help="compile FlashInfer's module first")
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    args = parser.parse_args()
    if args.build_peer:
        from shardwise.ops.moe.cutlass import build_cutlass_moe

        build_cutlass_moe()
    bench_moe.run(argparse.Namespace(layer=LAYERS, experts=None, tokens=TOKENS, json=args.json))


if __name__ == "__main__":
    main()
