"""`--json [FILE]`, which every verb has: without FILE, or with -, JSON has standard output to itself."""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from shardwise.launch.cli import UsageError

STREAMED = ("--json", "--export-tp-plan")
"""Options whose result may go to standard output."""


def add_json(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", what: str = "the result") -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help=f"{what} as JSON, to FILE or standard output"
    )


def require_writable(target: str | None, option: str = "--json") -> None:
    """UsageError for a FILE that could not be written: before the work, not when it is done."""
    if target is None or (target == "-" and option in STREAMED):
        return
    if not target:
        raise UsageError(f"{option} is empty: name a file")
    if target == "-":
        raise UsageError(f"{option} -: does not go to standard output, name a file")
    path = Path(target).absolute()
    if not path.parent.is_dir():
        raise UsageError(f"{option} {target}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{option} {target}: is a folder, name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {target}: no permission to write there")


def table_stream(target: str | None) -> TextIO:
    """Where the text for people goes beside JSON."""
    return sys.stderr if target == "-" else sys.stdout


def write_json(value: Any, target: str | None) -> None:
    """To a file, to standard output for `-`, nowhere for None."""
    if target is not None:
        escaped = target == "-" and (getattr(sys.stdout, "encoding", None) or "utf-8").lower() != "utf-8"
        write_lines([json.dumps(value, indent=1, ensure_ascii=escaped)], target)


def write_lines(lines: Iterable[str], target: str) -> None:
    """To a file, in UTF-8, or to standard output for `-`. Its errors name it, also that of a full disk."""
    if target == "-":
        for line in lines:
            print(line)
        return
    try:
        with Path(target).open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        error.filename = error.filename or target
        raise
