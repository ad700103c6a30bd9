"""`shardwise ops`: every operator, whether it runs on this machine, and if not, why and what to call instead."""

import argparse

from shardwise.launch.cli import DONE, UsageError
from shardwise.launch.cli.output import add_json, require_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--category", metavar="NAME", help="only this category, such as rope or moe")
    parser.add_argument("--backend", metavar="NAME", help="only this backend, such as torch or triton")
    parser.add_argument("--schema", action="store_true", help="print the full schemas too")
    add_json(parser, "the operators")


def run(args: argparse.Namespace) -> int:
    """Print the table; UsageError for an unknown category or backend."""
    require_writable(args.json)
    from shardwise.ops import operators
    from shardwise.ops.registry import BACKENDS, CATEGORIES

    for option, value, legal in (("category", args.category, CATEGORIES), ("backend", args.backend, BACKENDS)):
        if value is not None and value not in legal:
            raise UsageError(f"--{option} {value}: choose one of {', '.join(legal)}")
    rows = [
        _row(info)
        for info in operators()
        if args.category in (None, info.category) and args.backend in (None, info.backend)
    ]
    write_json({"operators": rows}, args.json)
    if args.json != "-":
        _print_table(rows, args.schema)
    return DONE


def _row(info) -> dict:
    available, reason = info.availability()
    return {
        "operator": f"torch.ops.{info.namespace}.{info.name}",
        "category": info.category,
        "backend": info.backend,
        "available": available,
        "reason": reason,
        "instead": None if available or info.instead is None else f"torch.ops.{info.namespace}.{info.instead}",
        "schema": info.schema,
        "mutates": list(info.mutates),
    }


def _print_table(rows: list[dict], schemas: bool) -> None:
    width = max((len(row["operator"]) for row in rows), default=0) - len("torch.ops.")
    category = None
    for row in rows:
        if row["category"] != category:
            category = row["category"]
            print(f"{category}")
        name = row["operator"].removeprefix("torch.ops.")
        state = row["reason"] if row["available"] else f"no: {row['reason']}"
        if row["instead"]:
            state += f"; use {row['instead'].removeprefix('torch.ops.')}"
        print(f"  {name:{width}}  {row['backend']:10}  {state}")
        if schemas:
            print(f"      {row['schema']}")
    ready = sum(row["available"] for row in rows)
    print(f"{len(rows)} operators, {ready} of them run here")
