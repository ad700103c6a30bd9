"""`shardwise plan MODEL`: what every rank holds, reads and sends, without weights; `plan diff A B` compares plans."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from shardwise.sharding.axes import Axis
from shardwise.sharding.layout import ParallelLayout

DONE, USAGE, DOES_NOT_FIT = 0, 2, 3
_UNITS = {"k": 1 << 10, "m": 1 << 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="config.json, model folder, GGUF file, hub id or a known name; or: diff A B")
    add("files", nargs="*", metavar="FILE", help="with diff: the two plan files")
    layout = parser.add_argument_group("layout")
    layout.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel ranks (default 1)")
    layout.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallel ranks (default 1)")
    layout.add_argument("--moe-tp", type=int, default=0, metavar="N", help="ranks that share an expert (world / ep)")
    layout.add_argument("--attn-dp", type=int, default=1, metavar="N", help="attention data parallel groups")
    layout.add_argument("--pad", action="append", default=[], metavar="AXIS", choices=[str(a) for a in Axis])
    layout.add_argument(
        "--redundant-experts", type=int, default=0, metavar="N", help="copies of experts, over all ranks"
    )
    layout.add_argument(
        "--expert-load", metavar="FILE", help="JSON list of the load of every expert, to place copies by"
    )
    layout.add_argument(
        "--dtype", metavar="NAME", help="as if plain weights were stored so: float32, bfloat16, float16"
    )
    layout.add_argument("--extras", action="append", default=[], metavar="NAME", help="load as well: vision, mtp")
    layout.add_argument("--tp-plan", metavar="FILE", help="a Transformers tp_plan, for an architecture that is unknown")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--device", metavar="NAME", help="h200, h100, b200, a100, mi300x, cpu or a topology file")
    cost.add_argument("--nodes", type=int, default=1, metavar="N")
    cost.add_argument("--context", type=_tokens, default=4096, metavar="N", help="tokens a sequence, 32k is 32768")
    cost.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default 1)")
    cost.add_argument("--prompt", type=_tokens, default=1024, metavar="N", help="new tokens a sequence in prefill")
    cost.add_argument("--kv-bytes", type=int, default=2, choices=(1, 2, 4), help="bytes of a cached element")
    search = parser.add_argument_group("instead of one plan")
    search.add_argument("--legal", action="store_true", help="the legal sizes of every mesh axis and what stops others")
    search.add_argument("--search", action="store_true", help="every layout on --gpus devices, ranked")
    search.add_argument("--gpus", type=int, default=8, metavar="N")
    search.add_argument("--objective", default="latency", choices=("latency", "throughput", "memory"))
    out = parser.add_argument_group("output")
    out.add_argument("--per-tensor", action="store_true", help="list every tensor instead of patterns (with --json)")
    out.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE or standard output")
    out.add_argument("--export-tp-plan", nargs="?", const="-", metavar="FILE", help="as a Transformers tp_plan")
    out.add_argument("--html", metavar="FILE", help="the plan as one page")


def run(args: argparse.Namespace) -> int:
    """0; 2 for a layout that the model does not allow; 3 when it does not fit the device."""
    from shardwise.sharding.cutting import IllegalLayout

    try:
        if args.model == "diff":
            return _diff(args)
        if args.files:
            raise ValueError(f"unexpected {args.files[0]!r}: one MODEL at a time (two files only after diff)")
        if args.legal:
            return _legal(args)
        return _search(args) if args.search else _plan(args)
    except ValueError as error:
        if type(error) not in (ValueError, IllegalLayout):
            raise
        print(f"shardwise: error: {error}", file=sys.stderr)
        return USAGE


def _plan(args: argparse.Namespace) -> int:
    from shardwise.sharding.plan import plan

    layout = ParallelLayout(args.tp, args.attn_dp, args.moe_tp, args.ep)
    planned = plan(
        args.model,
        layout,
        pad=args.pad,
        extras=args.extras,
        dtype=args.dtype,
        kv_itemsize=args.kv_bytes,
        redundant_experts=args.redundant_experts,
        expert_load=_load(args.expert_load),
        tp_plan=_styles(args.tp_plan),
    )
    if args.export_tp_plan:
        from shardwise.sharding.tp_export import export_tp_plan

        _write([json.dumps(export_tp_plan(planned), indent=1)], args.export_tp_plan)
        return DONE
    cost = _cost(args, planned)
    if args.json:
        from shardwise.sharding.document import document_lines

        _write(document_lines(planned, per_tensor=args.per_tensor, cost=cost), args.json)
    if args.html:
        from shardwise.sharding.page.page import page

        topology, workload, estimate = cost or _cost(args, planned, "h200")
        Path(args.html).write_text(page(planned, topology, workload, estimate))
    if args.json != "-":
        from shardwise.sharding.report import text_report

        print(text_report(planned, cost))
    if cost and not cost[2].memory.fits:
        missing = -cost[2].memory.left / 2**30
        print(f"does not fit: {missing:.2f} GiB too much on the fullest rank of {args.device}", file=sys.stderr)
        return DOES_NOT_FIT
    return DONE


def _cost(args: argparse.Namespace, planned, device: str | None = None):
    """(topology, workload, estimate), or None where no device is named."""
    device = device or args.device
    if device is None:
        return None
    from shardwise.sharding.cost import estimate

    topology, workload = _machine(args, device)
    return topology, workload, estimate(planned, topology, workload)


def _machine(args: argparse.Namespace, device: str):
    from shardwise.sharding import topology
    from shardwise.sharding.cost import Workload

    return topology.load(device, nodes=args.nodes), Workload(batch=args.batch, context=args.context, prompt=args.prompt)


def _legal(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from shardwise.sharding.legal import legal_sizes, legal_text
    from shardwise.sharding.source import load_model

    sizes = legal_sizes(load_model(args.model))
    if args.json:
        _write([json.dumps([asdict(s) for s in sizes], indent=1)], args.json)
    if args.json != "-":
        print(legal_text(sizes))
    return DONE


def _search(args: argparse.Namespace) -> int:
    from shardwise.sharding.report import search_report, search_rows
    from shardwise.sharding.search import Objective, search
    from shardwise.sharding.source import load_model

    topology, workload = _machine(args, args.device or "h200")
    found = search(load_model(args.model), topology, workload, devices=args.gpus, objective=Objective(args.objective))
    if args.json:
        _write([json.dumps(search_rows(found), indent=1)], args.json)
    if args.html and found.ranked:
        from shardwise.sharding.page.page import page

        best = found.ranked[0]
        Path(args.html).write_text(page(best.plan, topology, workload, best.estimate, found))
    if args.json != "-":
        print(search_report(found))
    return DONE if found.ranked and found.ranked[0].estimate.memory.fits else DOES_NOT_FIT


def _diff(args: argparse.Namespace) -> int:
    from shardwise.sharding.diff import diff, diff_text, read_document

    if len(args.files) != 2:
        raise ValueError(f"plan diff takes two plan files, got {len(args.files)}: shardwise plan diff A.json B.json")
    changes = diff(*(read_document(Path(f)) for f in args.files))
    if args.json:
        _write([json.dumps(changes, indent=1)], args.json)
    if args.json != "-":
        print(diff_text(changes))
    return DONE


def _load(path: str | None) -> tuple[float, ...] | None:
    if path is None:
        return None
    from shardwise.sharding.experts import read_load

    return read_load(path)


def _styles(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    from shardwise.sharding.tp_styles import read_tp_plan

    return read_tp_plan(path)


def _tokens(text: str) -> int:
    """A count with an optional k (1024) or m."""
    unit = _UNITS.get(text[-1:].lower(), 1)
    number = text[:-1] if unit > 1 else text
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no token count; examples: 4096, 32k, 1m")
    return int(number) * unit


def _write(lines: Iterable[str], target: str) -> None:
    if target == "-":
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return
    with Path(target).open("w") as file:
        file.writelines(f"{line}\n" for line in lines)
