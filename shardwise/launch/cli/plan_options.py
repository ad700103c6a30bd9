"""Options of `shardwise plan`, and which of them mean something together."""

import argparse

from shardwise.launch.cli import positive
from shardwise.launch.cli.layout import SIZES, add_layout
from shardwise.launch.cli.output import add_json
from shardwise.sharding.axes import Axis

DEFAULTS: dict[str, int | str] = {
    "redundant_experts": 0,
    "kv_bytes": 2,
    "context": 4096,
    "batch": 1,
    "prompt": 1024,
    "gpus": 8,
    "objective": "latency",
}
"""Of options that the parser leaves at None, so that options that were given differ from those that were not."""
_PLAN = {*SIZES, "pad", "redundant_experts", "expert_load", "dtype", "extras", "tp_plan"}
_CACHED = {"context", "batch"}
_WORKLOAD = {"nodes", "prompt"} | _CACHED
_SEARCH = {"gpus", "objective"}
_UNITS = {"k": 1 << 10, "m": 1 << 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="config.json (- is stdin), model folder, GGUF file, hub id or a known name; or: diff A B",
    )
    add("files", nargs="*", default=[], metavar="FILE", help="with diff: the two plan files")
    layout = parser.add_argument_group("layout")
    add_layout(layout)
    axes = [str(axis) for axis in Axis]
    layout.add_argument(
        "--pad",
        action="append",
        default=[],
        metavar="AXIS",
        choices=axes,
        help=f"to a legal size, may be repeated: {', '.join(axes)}",
    )
    layout.add_argument("--redundant-experts", type=int, metavar="N", help="copies of experts, over all ranks")
    layout.add_argument(
        "--expert-load", metavar="FILE", help="JSON list of the load of every expert, to place copies by"
    )
    layout.add_argument(
        "--dtype", metavar="NAME", help="as if plain weights were stored so: float32, bfloat16, float16, float8_e4m3fn"
    )
    layout.add_argument(
        "--extras", action="append", default=[], metavar="NAME", help="load as well, may be repeated: vision, mtp"
    )
    layout.add_argument("--tp-plan", metavar="FILE", help="a Transformers tp_plan, for an architecture that is unknown")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--device", metavar="NAME", help="h200, h100, b200, a100, mi300x, cpu or a topology file")
    cost.add_argument("--nodes", type=positive, metavar="N", help="hosts of the ranks (default: as few as hold them)")
    cost.add_argument("--context", type=_tokens, metavar="N", help="tokens a sequence, 32k is 32768 (default 4096)")
    cost.add_argument("--batch", type=positive, metavar="N", help="sequences, over all ranks (default 1)")
    cost.add_argument("--prompt", type=_tokens, metavar="N", help="new tokens a sequence in prefill (default 1024)")
    cost.add_argument("--kv-bytes", type=int, choices=(1, 2, 4), help="bytes of a cached element (default 2)")
    search = parser.add_argument_group("instead of one plan")
    search.add_argument("--legal", action="store_true", help="the legal sizes of every mesh axis and what stops others")
    search.add_argument("--search", action="store_true", help="every layout on --gpus devices, ranked")
    search.add_argument("--gpus", type=positive, metavar="N", help="default 8, at most 4096")
    search.add_argument(
        "--objective", choices=("latency", "throughput", "memory"), help="what ranks them (default latency)"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--per-tensor", action="store_true", help="list every tensor instead of patterns (with --json)")
    add_json(out)
    out.add_argument("--export-tp-plan", nargs="?", const="-", metavar="FILE", help="as a Transformers tp_plan")
    out.add_argument("--html", metavar="FILE", help="the plan as one page, costs on --device (default h200)")


def settle(args: argparse.Namespace) -> None:
    """Fill in the defaults; `cached`: whether a cache was asked for. ValueError for an option without an effect."""
    _refuse_unused(args)
    args.cached = any(getattr(args, name) is not None for name in _CACHED)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _refuse_unused(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if name != "model" and value in ("", [""]):
            raise ValueError(f"--{name.replace('_', '-')} is empty: name something, or leave it out")
    given = {name for name, value in vars(args).items() if value not in (None, False, [])}
    given -= {"model", "files", "debug"}
    mode, used = _mode(args)
    for name in vars(args):  # in the order of the help
        if name in given and name not in used | {mode.lstrip("-").replace("-", "_")}:
            option = f"--{name.replace('_', '-')}"
            if mode:
                raise ValueError(f"{option} has no effect with {mode}: drop one of them")
            if name in _WORKLOAD:
                raise ValueError(f"{option} is for the cost on a machine: add --device NAME")
            raise ValueError(f"{option} is for {'--json' if name == 'per_tensor' else '--search'}: add that")


def _mode(args: argparse.Namespace) -> tuple[str, set[str]]:
    """What is asked for instead of one plan, if anything, and the options that it uses."""
    if args.model == "diff":
        return "diff", {"json"}
    if args.legal:
        return "--legal", {"json"}
    if args.search:
        return "--search", {"json", "html", "device", "dtype", "kv_bytes"} | _WORKLOAD | _SEARCH
    if args.export_tp_plan:
        return "--export-tp-plan", set(_PLAN)
    has_cost = args.device or args.html
    used = _PLAN | _CACHED | {"kv_bytes", "device", "html", "json"} | (_WORKLOAD if has_cost else set())
    return "", used | ({"per_tensor"} if args.json else set())


def _tokens(text: str) -> int:
    """A count with an optional k (1024) or m."""
    unit = _UNITS.get(text[-1:].lower(), 1)
    number = text[:-1] if unit > 1 else text
    try:
        return positive(number) * unit
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a token count; examples: 4096, 32k, 1m") from None
