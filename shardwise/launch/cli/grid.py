"""Options that every verb has that starts ranks: the grid, the launcher, the device."""

import argparse
import os
from typing import TYPE_CHECKING

from shardwise.comm.watch import LOG_FOLDER_ENV
from shardwise.launch.cli import UsageError, positive
from shardwise.launch.cli.layout import add_layout
from shardwise.launch.model_config import UNSET
from shardwise.launch.start import LAUNCHERS, require_launcher
from shardwise.parallel import options
from shardwise.parallel.options import made_folder

if TYPE_CHECKING:
    from shardwise.comm.rank import RankInfo
    from shardwise.launch.model_config import ModelConfig


def add_grid(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    grid = parser.add_argument_group("ranks")
    grid.add_argument("-n", "--world", type=positive, metavar="N", help="ranks in all (default tp x attn-dp)")
    add_layout(grid, tp_default="world / attn-dp")
    grid.set_defaults(**UNSET)
    grid.add_argument(
        "--launcher", metavar="NAME", help=f"who starts the ranks: {', '.join(LAUNCHERS)} (default local)"
    )
    grid.add_argument("--ray-address", metavar="ADDRESS", help="an existing Ray cluster, for instance auto")
    grid.add_argument(
        "--transport", default="auto", metavar="NAME", help=f"what moves the bytes: {', '.join(options.RUN_TRANSPORTS)}"
    )
    grid.add_argument(
        "--device", default="auto", choices=options.DEVICES, help="auto: one GPU a rank where there are GPUs"
    )
    grid.add_argument(
        "--plan", metavar="FILE", help="run the layout of a plan; a checkpoint it was not made for is refused"
    )
    grid.add_argument("--log-dir", metavar="DIR", help="where the ranks' logs and failure.json go")
    return grid


def add_forms(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """How weights and cache are held, and what computes with them."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=options.DTYPES,
        help="of weights and activations (auto: bfloat16 on GPUs, float32 on the CPU)",
    )
    parser.add_argument(
        "--weights",
        default="auto",
        choices=options.WEIGHT_FORMS,
        help="whether quantised weights stay packed (auto: on GPUs, where a layer computes with them)",
    )
    parser.add_argument(
        "--cache-tokens",
        type=positive,
        metavar="N",
        help="tokens that the KV cache holds (default: room for what is asked for, on GPUs what the weights leave)",
    )
    parser.add_argument(
        "--decode",
        default="auto",
        choices=options.DECODE_PATHS,
        help="what runs decode steps (auto: graphs on GPUs, where the model allows)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=options.ATTENTIONS,
        help="attention kernels for prompts on GPUs (auto: triton, where they serve the model)",
    )


def model_config(args: argparse.Namespace, info: "RankInfo", model: str) -> "ModelConfig":
    """The model of the command line. UsageError for what contradicts itself or is unknown."""
    from shardwise.launch import model_config as configs
    from shardwise.sharding.config import ConfigError

    named = {name: getattr(args, name) for name in configs.ModelOptions.__annotations__ if name in args}
    try:
        require_launcher(args.launcher, args.ray_address)
        return configs.model_config(info, args.launcher, model, **{**named, "tp": _tensor_parallel(args)})
    except ConfigError as error:
        raise UsageError(f"--plan {error}") from None
    except ValueError as error:
        raise error if type(error) is not ValueError else UsageError(str(error)) from None


def _tensor_parallel(args: argparse.Namespace) -> int | None:
    """--tp, or what -n leaves for it. UsageError names both sides of a contradiction."""
    if args.world is None:
        return args.tp
    if args.world % args.attn_dp or args.tp not in (None, args.world // args.attn_dp):
        asked = f"--tp {args.tp} x " if args.tp is not None else ""
        raise UsageError(f"-n {args.world} contradicts {asked}--attn-dp {args.attn_dp}: tp x attn-dp is the world")
    return args.world // args.attn_dp


def set_log_folder(folder: str | None) -> None:
    """UsageError where there is none and none can be made."""
    if folder is not None:
        try:
            os.environ[LOG_FOLDER_ENV] = made_folder("--log-dir", folder)
        except ValueError as error:
            raise UsageError(str(error)) from None
