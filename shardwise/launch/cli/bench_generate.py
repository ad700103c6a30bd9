"""`shardwise bench generate MODEL`: how fast a model generates, and how near to what the memory allows.

Starts the ranks itself, or runs inside ranks that torchrun or mpirun started.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from shardwise.launch import env
from shardwise.launch.cli import DONE, UsageError, positive
from shardwise.launch.cli.grid import add_forms, add_grid, model_config, set_log_folder
from shardwise.launch.cli.output import add_json, require_writable, write_json
from shardwise.launch.interrupt import interruptible
from shardwise.launch.progress import LoadProgress
from shardwise.launch.start import launcher_options, run_job
from shardwise.parallel.host_memory import require_bytes

if TYPE_CHECKING:
    from shardwise.comm.rank import RankInfo
    from shardwise.launch.generation import Load
    from shardwise.launch.model_config import ModelConfig

TOKEN_BYTES = 36
"""Of one token's id in a list of Python's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a known name (smollm2), GGUF file, model folder or hub id"
    )
    parser.add_argument("--shape", metavar="CONFIG", help="in place of MODEL: a config.json, with --dummy-weights")
    parser.add_argument("--dummy-weights", action="store_true", help="random weights of the model's shapes and types")
    add_grid(parser)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="prompts at once, over all ranks (default 1)"
    )
    load.add_argument("--input", type=positive, default=256, metavar="N", help="tokens of a prompt (default 256)")
    load.add_argument("--output", type=positive, default=128, metavar="N", help="new tokens of a prompt (default 128)")
    load.add_argument(
        "--runs", type=positive, default=3, metavar="N", help="timed runs (default 3); the median is shown"
    )
    load.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and dummy weights (default 0)")
    add_forms(load)
    out = parser.add_argument_group("output")
    out.add_argument("--trace", metavar="DIR", help="write a Chrome trace of each rank there, of a run of its own")
    add_json(out, "everything")


def run(args: argparse.Namespace) -> int:
    """0; errors come out as exceptions. Nothing of torch is imported unless this process is itself a rank."""
    from shardwise.launch.generation import MEASURE
    from shardwise.launch.model_config import within

    info = env.detect()
    load = _load(args)
    config = replace(_config(args, info), request_tokens=load.input + load.output)
    require_writable(args.json)
    set_log_folder(args.log_dir)
    if within(info):
        _inside_rank(args, info, config, load)
    _check_fit(config, load)
    payload = {"model": asdict(config), "load": asdict(load), "trace": config.trace}
    launcher = args.launcher or "local"
    with interruptible(), LoadProgress(sys.stderr) as progress:
        ranks = run_job(
            MEASURE,
            payload,
            world=config.world,
            launcher=launcher,
            options=launcher_options(launcher, args.ray_address, config.device),
            on_event=_listener(progress),
            debug=args.debug,
        )
    _show(args, config, load, launcher, ranks)
    return DONE


def _inside_rank(args: argparse.Namespace, info: "RankInfo", config: "ModelConfig", load: "Load") -> NoReturn:
    from shardwise.launch.worker import context_here, run_here

    def body() -> None:
        _check_fit(config, load)
        with LoadProgress(sys.stderr, enabled=info.rank == 0) as progress:
            context = context_here(info, {}, _listener(progress))
            from shardwise.launch.generation import measure_session
            from shardwise.launch.session import Session

            session = Session(context, config)
            mine = measure_session(session, load, config.trace)
            ranks = session.engine.groups.world.all_gather_object(mine)
            session.close()
        if info.rank == 0:
            _show(args, config, load, info.source, ranks)

    run_here(info, body, debug=args.debug)


def _listener(progress: LoadProgress) -> Callable[[dict], None]:
    def listen(event: dict) -> None:
        if event["event"] == "progress":
            progress.update(event["done"], event["total"])
        elif event["event"] == "stage":
            progress.note(event["stage"])

    return listen


def _config(args: argparse.Namespace, info: "RankInfo") -> "ModelConfig":
    if (args.model is None) == (args.shape is None):
        raise UsageError("name one MODEL, or a config.json by --shape")
    if args.shape is not None and not args.dummy_weights:
        raise UsageError("--shape names a model without weights: add --dummy-weights")
    config = model_config(args, info, args.model or args.shape)
    return replace(config, random_seed=args.seed) if args.dummy_weights else config


def _load(args: argparse.Namespace) -> "Load":
    from shardwise.launch.generation import Load

    return Load(batch=args.batch, input=args.input, output=args.output, runs=args.runs, seed=args.seed)


def _check_fit(config: "ModelConfig", load: "Load") -> None:
    """Errors of model, layout, lengths and batch, before any rank starts."""
    from shardwise.launch.model_config import plan_of
    from shardwise.parallel.supported import context

    length = load.input + load.output
    for holder, most in (("model's context", context(plan_of(config).model)), ("cache", config.cache_tokens)):
        if most and length > most:
            raise UsageError(
                f"--input {load.input} and --output {load.output} make {length} tokens, the {holder} holds {most}"
            )
    require_bytes(
        config.world * load.batch * length * TOKEN_BYTES,
        f"--batch {load.batch}: prompts and answers of {length} tokens",
        f" on {config.world} ranks",
    )


def _show(args: argparse.Namespace, config: "ModelConfig", load: "Load", launcher: str, ranks: list[dict]) -> None:
    from shardwise.launch.cli.generation_report import summary, text

    result: dict[str, Any] = {
        "model": config.model,
        "dummy_weights": config.random_seed is not None,
        "layout": config.layout,
        "launcher": launcher,
        "load": asdict(load),
        **summary(ranks, load.batch),
        "ranks": ranks,
    }
    if args.json != "-":
        print(text(result))
    write_json(result, args.json)
