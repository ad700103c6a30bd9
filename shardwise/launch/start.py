"""Start a job: what benchmarks, `run` and `LLM` do.

    results = run_job("package.module:function", {"size": 4096}, world=2)

calls `function(context)` on two new ranks and returns what each of them returned (JSON values).
"""

import inspect
import json
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from shardwise.comm.watch import LONGEST
from shardwise.launch.backend import Backend
from shardwise.launch.job import Job
from shardwise.launch.local import Local
from shardwise.launch.mpi import Mpi
from shardwise.launch.ray import Ray
from shardwise.launch.supervise import Supervisor
from shardwise.launch.torchrun import Torchrun

BACKENDS: dict[str, Callable[..., Backend]] = {"local": Local, "torchrun": Torchrun, "mpi": Mpi, "ray": Ray}
LAUNCHERS = tuple(BACKENDS)


def run_job(
    target: str,
    payload: Mapping[str, Any] | None = None,
    *,
    world: int,
    launcher: str = "local",
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    on_event: Callable[[dict], None] = lambda event: None,
    deadline: float | None = None,
    debug: bool = False,
) -> list[Any]:
    """Run `target` on `world` new ranks; returns each rank's result, by rank.

    options    of the launcher: Ray takes `address` and `device`
    on_event   called with what ranks emit: {"event": ..., "rank": ..., ...}
    deadline   seconds for the whole job once all ranks are there (None: no bound of its own)
    Raises JobFailed when a rank fails, ValueError or RuntimeError when the launcher cannot start it here, TypeError for
    an argument of another type, ValueError for one that no job can have.
    """
    _require_types(
        ("target", target, str, "a text like package.module:function"),
        ("payload", payload, Mapping | None, "a dict of JSON values"),
        ("world", world, int, "a whole number of ranks"),
        ("options", options, Mapping | None, "a dict of the launcher's options"),
        ("environment", environment, Mapping | None, "a dict of texts"),
        ("on_event", on_event, Callable, "a function of one event"),
        ("deadline", deadline, Real | None, "a number of seconds"),
    )
    _require_form(target, payload, world, environment, deadline)
    started_by = backend(launcher, **(options or {}))
    job = Job(target=target, payload=payload or {}, world=world, environment=environment or {}, debug=debug)
    with Supervisor(job, started_by) as supervisor:
        return supervisor.finish(on_event, deadline)


def _require_types(*arguments: tuple[str, Any, Any, str]) -> None:
    """TypeError for an argument (name, value, legal types, those in words) of another type."""
    for name, value, legal, words in arguments:
        if isinstance(value, bool) or not isinstance(value, legal):
            raise TypeError(f"{name} is {value!r:.60}, expected {words}")


def _require_form(
    target: str,
    payload: Mapping[str, Any] | None,
    world: int,
    environment: Mapping[str, str] | None,
    deadline: float | None,
) -> None:
    """ValueError for what no job can have, TypeError for what JSON or an environment does not hold."""
    if not all(target.partition(":")):
        raise ValueError(f"job target {target!r}: name a function as package.module:function")
    try:
        json.dumps(payload)
    except TypeError as error:
        raise TypeError(f"payload of job {target}: {error}; legal: numbers, texts, lists and dicts of them") from None
    if world < 1:
        raise ValueError(f"world is {world}: a job has at least one rank")
    for name, text in (environment or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"environment has {name!r}: {text!r:.60}, expected texts")
        if not name or "=" in name or "\0" in name + text:
            raise ValueError(f"environment has {name!r}: {text!r:.60}, which no variable can be")
    if deadline is not None and not 0 < deadline <= LONGEST:
        raise ValueError(f"deadline is {deadline}: give seconds above 0, at most {LONGEST}, or None for no bound")


def backend(launcher: str, **options: Any) -> Backend:
    """The launcher of that name. ValueError for an unknown one, TypeError for an option that it does not have."""
    require_launcher(str(launcher))
    legal = inspect.signature(BACKENDS[launcher]).parameters
    for name in options:
        if name not in legal:
            raise TypeError(f"launcher {launcher} has no option {name!r}; legal: {', '.join(legal) or 'none'}")
    return BACKENDS[launcher](**options)


def launcher_options(launcher: str, ray_address: str | None, device: str) -> dict[str, Any]:
    """What the launcher of that name wants to know beside the job."""
    return {"address": ray_address, "device": device} if launcher == "ray" else {}


def require_launcher(launcher: str | None, ray_address: str | None = None) -> None:
    """ValueError for an unknown one, and for a cluster's address that the launcher has no use for. None: local."""
    if launcher not in (None, *LAUNCHERS):
        raise ValueError(f"unknown launcher {launcher!r}; legal: {', '.join(LAUNCHERS)}")
    if ray_address == "":
        raise ValueError("the Ray address is empty: leave it out, and a cluster is started for this job")
    if ray_address is not None and launcher != "ray":
        raise ValueError(
            f"the Ray address {ray_address!r} has no effect with launcher {launcher or 'local'}: name launcher ray, or "
            "drop the address"
        )
