"""Norms, rope, state-space and delta-rule operators on one GPU, beside their peers and a plain copy of the same bytes.

    python benchmarks/ops_basics.py [--category NAME ...] [--json FILE]

The whole sweep of `shardwise bench ops`. Peers run in the same process: FlashInfer's kernels called directly, PyTorch's
RMS norm, fla's kernels called directly, and for the state-space scan fla's gated linear attention with one decay a
head, which is the same recurrence. A row's device time is the median of graph replays of 20 calls; `copy_us` is a copy
that moves as many bytes as the operator must; `host_us` is the host's time for an eager call.
"""

import argparse
import sys
from pathlib import Path

from shardwise.launch.cli import bench_ops

RESULTS = Path(__file__).parent / "results" / "ops-basics.json"


def main() -> int:
    """Run the full sweep and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--category", action="append", metavar="NAME")
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    args = parser.parse_args()
    return bench_ops.run(argparse.Namespace(category=args.category, full=True, json=args.json))


if __name__ == "__main__":
    sys.exit(main())
