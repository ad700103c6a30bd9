"""`shardwise plan MODEL`: what every rank holds, reads and sends, without weights; `plan diff A B` compares plans."""

import argparse
import json
import sys

from shardwise.launch.cli import file_of
from shardwise.launch.cli.output import require_writable, write_lines
from shardwise.launch.cli.plan_options import add_arguments, settle

__all__ = ["add_arguments", "run"]

DONE, USAGE, DOES_NOT_FIT = 0, 2, 3


def run(args: argparse.Namespace) -> int:
    """0; 2 for a layout that the model does not allow; 3 when it does not fit the device."""
    from shardwise.sharding.cutting import IllegalLayout

    for option in ("json", "html", "export_tp_plan"):
        require_writable(getattr(args, option), f"--{option.replace('_', '-')}")
    try:
        settle(args)
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

    planned = plan(
        args.model,
        tp=args.tp or 1,
        ep=args.ep or 1,
        moe_tp=args.moe_tp or 0,
        attn_dp=args.attn_dp or 1,
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

        styles = export_tp_plan(planned)
        if not styles:
            raise ValueError(f"--export-tp-plan: {planned.layout} cuts nothing, so there is no tp_plan: give --tp")
        write_lines([json.dumps(styles, indent=1)], args.export_tp_plan)
        return DONE
    cost = _cost(args, planned)
    workload = _workload(args) if args.cached else None
    if args.json:
        from shardwise.sharding.document import document_lines

        write_lines(document_lines(planned, per_tensor=args.per_tensor, cost=cost, workload=workload), args.json)
    if args.html:
        from shardwise.sharding.page.page import page

        topology, workload, estimate = cost or _cost(args, planned, "h200")
        write_lines([page(planned, topology, workload, estimate)], args.html)
    if args.json != "-":
        from shardwise.sharding.report import text_report

        print(text_report(planned, cost, workload))
    if cost and not cost[2].memory.fits:
        print(_misfit(args, planned, cost[1], -cost[2].memory.left), file=sys.stderr)
        return DOES_NOT_FIT
    return DONE


def _misfit(args: argparse.Namespace, planned, workload, missing: int) -> str:
    """One sentence: how much is missing, and what would fit."""
    from shardwise.sharding import topology
    from shardwise.sharding.capacity import devices_tried, remedies

    text = f"shardwise: does not fit: {missing / 2**30:.2f} GiB too much on the fullest rank of {args.device}"
    if args.pad or args.extras or args.redundant_experts:  # which a search does not carry over
        return text
    fitting = "; or ".join(remedies(planned, topology.load(args.device), workload))
    tried = devices_tried(planned.layout.world)
    if not fitting and not tried:
        return text
    return f"{text}; what fits: {fitting or f'no layout on up to {tried[-1]} ranks'}"


def _cost(args: argparse.Namespace, planned, device: str | None = None):
    """(topology, workload, estimate), or None where no device is named."""
    device = device or args.device
    if device is None:
        return None
    from shardwise.sharding.cost import estimate

    topology, workload = _machine(args, device, planned.layout.world)
    return topology, workload, estimate(planned, topology, workload)


def _machine(args: argparse.Namespace, device: str, ranks: int):
    from shardwise.sharding import topology

    workload = _workload(args)
    with file_of("--device"):
        machine = topology.load(device)
    return machine.spread(ranks, args.nodes), workload


def _workload(args: argparse.Namespace):
    from shardwise.sharding.cost import Workload

    return Workload(batch=args.batch, context=args.context, prompt=args.prompt)


def _legal(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from shardwise.sharding.legal import legal_sizes, legal_text
    from shardwise.sharding.source import load_model

    sizes = legal_sizes(load_model(args.model))
    if args.json:
        write_lines([json.dumps([asdict(s) for s in sizes], indent=1)], args.json)
    if args.json != "-":
        print(legal_text(sizes))
    return DONE


def _search(args: argparse.Namespace) -> int:
    from shardwise.sharding.formats import storage_type
    from shardwise.sharding.report import search_report, search_rows
    from shardwise.sharding.search import Objective, search
    from shardwise.sharding.source import load_model

    model = load_model(args.model)
    topology, workload = _machine(args, args.device or "h200", args.gpus)
    found = search(
        model.stored_as(storage_type(args.dtype)) if args.dtype else model,
        topology,
        workload,
        devices=args.gpus,
        objective=Objective(args.objective),
        kv_itemsize=args.kv_bytes,
    )
    if args.json:
        write_lines([json.dumps(search_rows(found), indent=1)], args.json)
    best = found.ranked[0]  # one rank is always legal
    if args.html:
        from shardwise.sharding.page.page import page

        write_lines([page(best.plan, topology, workload, best.estimate, found)], args.html)
    if args.json != "-":
        print(search_report(found))
    if found.fits:
        return DONE
    missing = -best.estimate.memory.left / 2**30
    print(f"shardwise: no layout fits: {missing:.2f} GiB too much a rank at best, on {best.layout}", file=sys.stderr)
    return DOES_NOT_FIT


def _diff(args: argparse.Namespace) -> int:
    from shardwise.sharding.diff import diff, diff_text
    from shardwise.sharding.plan_file import read_document

    if len(args.files) != 2:
        raise ValueError(f"plan diff takes two plan files, got {len(args.files)}: shardwise plan diff A.json B.json")
    changes = diff(*map(read_document, args.files))
    if args.json:
        write_lines([json.dumps(changes, indent=1)], args.json)
    if args.json != "-":
        print(diff_text(changes))
    return DONE


def _load(path: str | None) -> tuple[float, ...] | None:
    if path is None:
        return None
    from shardwise.sharding.experts import read_load

    with file_of("--expert-load"):
        return read_load(path)


def _styles(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    from shardwise.sharding.tp_styles import read_tp_plan

    with file_of("--tp-plan"):
        return read_tp_plan(path)
