"""The options that give a layout its sizes, the same for every verb that has one."""

import argparse

from shardwise.launch.cli import UsageError, positive
from shardwise.sharding.layout import ParallelLayout

SIZES = ("tp", "ep", "moe_tp", "attn_dp")


def add_layout(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", tp_default: str = "1") -> None:
    """Sizes of the mesh axes, None where nobody asks for one."""
    add = parser.add_argument
    add("--tp", type=positive, metavar="N", help=f"tensor parallel ranks (default {tp_default})")
    add("--ep", type=positive, metavar="N", help="expert parallel ranks (default 1)")
    add("--moe-tp", type=positive, metavar="N", help="ranks that share an expert (default world / ep)")
    add("--attn-dp", type=positive, metavar="N", help="attention data parallel groups (default 1)")


def layout_of(args: argparse.Namespace) -> ParallelLayout:
    """UsageError for a grid that does not close."""
    try:
        return ParallelLayout(args.tp or 1, args.attn_dp or 1, args.moe_tp or 0, args.ep or 1)
    except ValueError as error:
        raise UsageError(str(error)) from None
