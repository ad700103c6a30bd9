"""Decode steps that the planner predicts beside those that were measured: no GPU, no weights.

    python benchmarks/planner_accuracy.py [--results FILE ...]

FILE: what `decode_step.py --json` wrote; by default the kept runs on H200s, results/decode-*-h200*.json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from shardwise.sharding import topology
from shardwise.sharding.cost import Workload, estimate
from shardwise.sharding.plan import plan

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="instead of the kept runs")
    args = parser.parse_args()
    kept = sorted(file for file in (HERE / "results").glob("decode-*-h200*.json") if "variants" not in file.name)
    print(f"{'model':18} {'tp':>3} {'ep':>3} {'batch':>5} {'predicted':>10} {'measured':>10} {'ratio':>6}  bound by")
    for file in args.results or kept:
        for line in lines(json.loads(file.read_text())):
            print(line)


def lines(run: dict) -> Iterator[str]:
    """A line for each measured step of one run; times in milliseconds."""
    device = run["machine"]["gpu"].removeprefix("NVIDIA ").split()[0].lower()
    planned = plan(HERE / "shapes" / run["config"], tp=run["tp"], ep=run["ep"])
    machine = topology.load(device).spread(planned.layout.world)
    contexts = {row["batch"]: row["context"] for row in run["rows"] if "context" in row}
    for row in run["rows"]:
        if "step_ms" in row:
            step = estimate(planned, machine, Workload(batch=row["batch"], context=contexts[row["batch"]])).decode
            yield (
                f"{Path(run['config']).stem:18} {run['tp']:3} {run['ep']:3} {row['batch']:5} {step.total * 1e3:10.2f} "
                f"{row['step_ms']:10.2f} {step.total * 1e3 / row['step_ms']:6.2f}  {step.bound}"
            )


if __name__ == "__main__":
    main()
