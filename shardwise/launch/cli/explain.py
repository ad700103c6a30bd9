"""`shardwise explain failure.json`: the short report of a failed job, and on request everything that is known."""

import argparse
import json
from pathlib import Path

from shardwise.launch.cli import DONE
from shardwise.launch.cli.output import add_json, require_writable, write_json
from shardwise.launch.failure import Failure, primary, read_all, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a failure.json, or the folder of a failed job's logs")
    parser.add_argument("--trace", action="store_true", help="with the traceback or stacks of every rank")
    add_json(parser, "the cause and its victims")


def run(args: argparse.Namespace) -> int:
    """0; ValueError for a file that is not a failure report, FileNotFoundError for none."""
    require_writable(args.json)
    cause = load(Path(args.path))
    write_json(cause.to_json(), args.json)
    if args.json != "-":
        print(_full(cause) if args.trace else report(cause, sentence=False))
    return DONE


def load(path: Path) -> Failure:
    """The cause that a report or a folder of reports holds."""
    if path.is_dir():
        cause = primary(read_all(path))
        if cause is None:
            raise FileNotFoundError(f"{path}: no failure-rank-*.json in it, so no rank of that job reported a failure")
        return cause
    try:
        cause = Failure.from_json(json.loads(path.read_text()))
        _full(cause)  # what can be told has fields of the right types
        return cause
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: not a failure report of Shardwise: name a failure.json, or the folder of a failed job's logs"
        ) from None


def _full(cause: Failure) -> str:
    parts = [report(cause, sentence=False)]
    for failure in (cause, *cause.victims):
        if failure.trace:
            parts.append(f"rank {failure.rank}:\n{failure.trace.rstrip()}")
    return "\n\n".join(parts)
