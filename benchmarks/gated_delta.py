"""Gated delta layers on one GPU, the rule behind the convolution, with the heads of Qwen3-Next on one rank.

    python benchmarks/gated_delta.py [--batch 1 16 64] [--prompts 1x1024 1x8192 8x1024] [--fla] [--json FILE]

A step of one token reads and writes the states, beside a copy that moves as many bytes; launches in a graph, over more
states than the L2 cache holds. Prompts: `ours` makes unit queries and keys and the gates as well; `--fla` is fla-core's
`chunk_gated_delta_rule`, which is given the gates and makes queries and keys unit itself. Graph replays in turn, and
`host` the time of an eager call with the wait for its end.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import alternating_microseconds
from shardwise.ops.fla.decode import DeltaGates, DeltaHeads, delta_decode
from shardwise.ops.fla.prefill import delta_prefill

HEADS = DeltaHeads(keys=16, values=32, key_dim=128, value_dim=128)
STATES = 160
"""Sequences whose states exist: 320 MiB."""
Calls = dict[str, list[Callable[[], object]]]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def gates() -> DeltaGates:
    decay, bias = torch.rand(2, HEADS.values, device="cuda")
    return DeltaGates(-decay, bias, random(HEADS.value_dim), 1e-6)


def rows(tokens: int) -> torch.Tensor:
    return random(tokens, HEADS.channels + HEADS.values * (HEADS.value_dim + 2))


def steps(batch: int, states: torch.Tensor) -> Calls:
    slots, one = torch.arange(batch, device="cuda", dtype=torch.int32), gates()
    spare = torch.empty_like(states)

    def step(held: torch.Tensor) -> Callable[[], object]:
        given = rows(batch)
        return lambda: delta_decode(given, slots, held, HEADS, one, pdl=True)

    def copy(held: torch.Tensor, place: int) -> Callable[[], object]:
        return lambda: spare[place : place + len(held)].copy_(held)

    firsts = range(0, STATES - batch + 1, batch)
    held = [states[first : first + batch] for first in firsts]
    return {"ours": list(map(step, held)), "copy": list(map(copy, held, firsts))}


def prompts(sequences: int, tokens: int, states: torch.Tensor, *, fla: bool) -> Calls:
    given, one = rows(sequences * tokens), gates()
    bounds = torch.arange(0, sequences * tokens + 1, tokens, device="cuda", dtype=torch.int32)
    slots, fresh = torch.arange(sequences, device="cuda"), torch.zeros(sequences, device="cuda", dtype=torch.bool)
    found: Calls = {"ours": [lambda: delta_prefill(given, bounds, slots, fresh, states, HEADS, one, pdl=True)] * 4}
    if fla:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        keys, values = HEADS.keys * HEADS.key_dim, HEADS.values * HEADS.value_dim
        parts = given.split((keys, keys, values, values, HEADS.values, HEADS.values), 1)
        q, k, v = (
            part.reshape(sequences, tokens, -1, size).contiguous()
            for part, size in zip(parts, (HEADS.key_dim, HEADS.key_dim, HEADS.value_dim), strict=False)
        )
        raw = parts[5].float() + one.dt_bias
        decay = (one.log_decay * torch.nn.functional.softplus(raw)).view(sequences, tokens, -1)
        beta = parts[4].sigmoid().view(sequences, tokens, -1).contiguous()
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        found["fla"] = [lambda: chunk_gated_delta_rule(q, k, v, decay, beta, **options)] * 4
        ours, theirs = found["ours"][0](), found["fla"][0]()[0]
        difference = ((ours.view_as(theirs) - theirs).float().norm() / theirs.float().norm()).item()
        assert difference < 1e-2, f"fla's results differ by {difference:.3f} of the norm"
    return found


def host_microseconds(call: Callable[[], object], calls: int = 20) -> float:
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / calls


class Report:
    """Prints rows, and writes all of them after each."""

    def __init__(self, path: Path | None):
        self.path, self.rows = path, []

    def add(self, row: dict) -> None:
        print(row, flush=True)
        self.rows.append(row)
        if self.path:
            self.path.write_text(json.dumps({"machine": machine_facts(), "rows": self.rows}, indent=1))


def measure(args: argparse.Namespace, report: Report) -> None:
    states = torch.randn(STATES, HEADS.values, HEADS.key_dim, HEADS.value_dim, device="cuda")
    for batch in args.batch:
        times = alternating_microseconds(steps(batch, states), repeats=args.repeats)
        moved = 2 * batch * states[0].nbytes
        row = {"step": batch, "us": times, "terabytes_per_second": moved / times["ours"] / 1e6}
        report.add(row | {"share_of_copy": times["copy"] / times["ours"]})
    for name in args.prompts:
        calls = prompts(*map(int, name.split("x")), states, fla=args.fla)
        times = alternating_microseconds(calls, repeats=args.repeats)
        host = {which: host_microseconds(each[0]) for which, each in calls.items()}
        report.add({"prompt": name, "us": times, "host_us": host})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--prompts", nargs="*", default=["1x1024", "1x8192", "8x1024"], metavar="SEQUENCESxTOKENS")
    parser.add_argument("--fla", action="store_true", help="fla-core beside our kernels for prompts")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        measure(args, Report(args.json))


if __name__ == "__main__":
    main()
