"""Styles of Transformers' `tp_plan` dictionaries (module globs to styles), as far as a planner can follow them."""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path

from shardwise.sharding.config import ConfigError, read_json

COLUMN = ("colwise", "colwise_gather_output", "colwise_rep", "packed_colwise", "local_colwise", "local_packed_rowwise")
ROW = ("rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise")
WHOLE = (
    *("replicate", "replicated", "replicated_with_grad_allreduce", "sequence_parallel", "gather", "local"),
    *("local_params", "mla_kv_a_proj", "all_reduce", "embedding_rowwise", "embedding_colwise"),
)
EXPERTS = ("moe_tp_experts", "ep_dispatch_experts", "moe_identity_expert", "grouped_gemm", "packed_rowwise")
"""Of a module that holds a layer's experts, and of its stacked tensors: how they are cut is the layout's to say."""


def read_tp_plan(path: str | Path) -> dict[str, str]:
    """A JSON object of globs to known styles; ConfigError names the entry that is none."""
    data = read_json(path, dict, "an object of module globs to styles")
    known = (*COLUMN, *ROW, *WHOLE, *EXPERTS)
    for glob, style in data.items():
        if style not in known:
            raise ConfigError(f"{path}: {glob} is {style!r}, expected one of {', '.join(known)}")
    return data


def style_of(module: str, styles: Mapping[str, str]) -> str:
    """`column`, `row`, `whole` or nothing, of a module by the first glob that its name ends with."""
    for glob, style in styles.items():
        if _matches(module, glob):
            return "column" if style in COLUMN else "row" if style in ROW else "" if style in EXPERTS else "whole"
    return ""


def unmatched(styles: Mapping[str, str], names: Iterable[str]) -> tuple[str, ...]:
    """A note of the globs that no tensor of these names, and no module around one, matches."""
    modules = {".".join(parts[:n]) for name in names for parts in [name.split(".")] for n in range(1, len(parts) + 1)}
    globs = [glob for glob in styles if not any(_matches(module, glob) for module in modules)]
    return (f"the tp_plan's {', '.join(globs)} matches no module of the checkpoint",) if globs else ()


def _matches(module: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(module, glob) or fnmatch.fnmatchcase(module, f"*.{glob}")
