"""Styles of Transformers' `tp_plan` dictionaries (module globs to styles), as far as a planner can follow them."""

import fnmatch
from collections.abc import Mapping
from pathlib import Path

from shardwise.sharding.config import ConfigError, read_json

COLUMN = ("colwise", "colwise_gather_output", "colwise_rep", "packed_colwise", "local_colwise", "local_packed_rowwise")
ROW = ("rowwise", "rowwise_split_input", "local_rowwise")
WHOLE = ("replicated", "replicated_with_grad_allreduce", "sequence_parallel", "gather", "local", "embedding_rowwise")


def read_tp_plan(path: str | Path) -> dict[str, str]:
    """A JSON object of globs to known styles; ConfigError names the entry that is none."""
    data = read_json(path, dict, "an object of module globs to styles")
    known = (*COLUMN, *ROW, *WHOLE)
    for glob, style in data.items():
        if style not in known:
            raise ConfigError(f"{path}: {glob} is {style!r}, expected one of {', '.join(known)}")
    return data


def style_of(module: str, styles: Mapping[str, str]) -> str:
    """`column`, `row`, `whole` or nothing, of a module by the first glob that its name ends with."""
    for glob, style in styles.items():
        if fnmatch.fnmatchcase(module, glob) or fnmatch.fnmatchcase(module, f"*.{glob}"):
            return "column" if style in COLUMN else "row" if style in ROW else "whole"
    return ""
