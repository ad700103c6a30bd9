"""What the operator library adds to a call on the host, in µs per eager call on CPU tensors of one element.

    python benchmarks/ops_dispatch.py [--calls 20000] [--json FILE]

Compared in the same run, all around one Python function that returns its argument's clone: the function itself, the
same through `torch.library.Library` define and impl (what the registry uses), through its overload, with a need to
check, with a mutated argument, and through `torch.library.custom_op` without and with a mutated argument.
"""

import argparse
import json
import timeit
from pathlib import Path

import torch

from shardwise.launch.machine import machine_facts
from shardwise.ops.registry import Need, _define, _describe


def subject(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The body of every operator here."""
    return x.clone()


def writing(x: torch.Tensor, scale: float) -> None:
    """The body of operators that write their argument."""
    x.zero_()


def registered(function, name: str, mutates=(), needs=()):
    """`function` as the registry would register it."""
    function.__name__, function.__module__ = name, "shardwise.ops.utils.reference"
    info = _describe(function, mutates, needs, None, "shardwise_bench")
    _define(info, function, lambda x, scale: None if mutates else torch.empty_like(x))
    return getattr(torch.ops.shardwise_bench, name)


def variants() -> dict:
    """Label -> callable of (x, scale)."""

    def copy_of(function):
        return type(function)(function.__code__, globals(), function.__name__, None, function.__closure__)

    def annotated(function):
        twin = copy_of(function)
        twin.__annotations__ = function.__annotations__
        return twin

    present = Need("present", lambda: (True, "here"), on_cpu=lambda: True)
    plain = registered(annotated(subject), "torch_plain")
    custom = torch.library.custom_op("shardwise_bench::custom", annotated(subject), mutates_args=())
    custom_writing = torch.library.custom_op("shardwise_bench::custom_writing", annotated(writing), mutates_args=("x",))
    return {
        "plain function": subject,
        "registry": plain,
        "registry, overload": plain.default,
        "registry, with a need": registered(annotated(subject), "torch_needy", needs=(present,)),
        "plain function that writes": writing,
        "registry, mutated argument": registered(annotated(writing), "torch_writing", mutates=("x",)),
        "custom_op": custom,
        "custom_op, mutated argument": custom_writing,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, rows = torch.zeros(1), []
    for label, call in variants().items():
        call(x, 1.0)
        times = timeit.repeat(lambda call=call: call(x, 1.0), number=args.calls, repeat=7)
        rows.append({"call": label, "us": min(times) / args.calls * 1e6})
        print(f"{label:28} {rows[-1]['us']:7.2f} µs")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
