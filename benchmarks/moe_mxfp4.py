"""gpt-oss mixture-of-experts layers with MXFP4 weights on one GPU, whole operator, beside the device's floors.

    python benchmarks/moe_mxfp4.py [--json FILE]

The layer of gpt-oss-120b with all 128 experts and with the 64 of one of two expert-parallel ranks, 1 to 8192 tokens;
beside OpenAI's triton_kernels where they are installed.
Times are medians of graph replays over eight sets of random tokens, routed by a random router. The memory floor reads
the weights of the experts that got tokens once, at the rate of a plain copy measured in the same run; the matrix
floor is the products' operations at the rate of a large bf16 product. moe_mxfp4.md discusses what was measured.
"""

import argparse
import json
from pathlib import Path

from shardwise.launch.cli import bench_moe

RESULTS = Path(__file__).parent / "results" / "moe-mxfp4.json"


def main() -> None:
    """Measure each share of experts and write all rows to one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    args = parser.parse_args()
    target, merged = Path(args.json), {}
    for experts in (128, 64):
        bench_moe.run(argparse.Namespace(layer=["gpt-oss-120b"], experts=experts, tokens=None, json=args.json))
        part = json.loads(target.read_text())
        merged = {**part, "rows": merged.get("rows", []) + part["rows"]}
        target.write_text(json.dumps(merged, indent=1) + "\n")  # what is measured is kept if the rest is cut


if __name__ == "__main__":
    main()
