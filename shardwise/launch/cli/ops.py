"""`shardwise ops`: every operator, whether it runs on this machine, and if not, why and what to call instead."""

import argparse
import json
import sys
from pathlib import Path

USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--category", metavar="NAME", help="only this category, such as rope or moe")
    parser.add_argument("--backend", metavar="NAME", help="only this backend, such as torch or triton")
    parser.add_argument("--schema", action="store_true", help="print the full schemas too")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE or standard output")


def run(args: argparse.Namespace) -> int:
    """Print the table; 2 for an unknown category or backend."""
    from shardwise.ops import operators
    from shardwise.ops.registry import BACKENDS, CATEGORIES

    for option, value, legal in (("category", args.category, CATEGORIES), ("backend", args.backend, BACKENDS)):
        if value is not None and value not in legal:
            print(f"shardwise ops: --{option} {value}: choose one of {', '.join(legal)}", file=sys.stderr)
            return USAGE
    rows = [
        _row(info)
        for info in operators()
        if args.category in (None, info.category) and args.backend in (None, info.backend)
    ]
    if args.json is not None:
        _write_json(rows, args.json)
    else:
        _print_table(rows, args.schema)
    return 0


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


def _write_json(rows: list[dict], target: str) -> None:
    text = json.dumps({"operators": rows}, indent=1)
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n")


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
