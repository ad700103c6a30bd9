"""Start a job: what benchmarks, `run` and `LLM` do.

    results = run_job("package.module:function", {"size": 4096}, world=2)

calls `function(context)` on two new ranks and returns what each of them returned (JSON values).
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

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
    Raises JobFailed when a rank fails, ValueError or RuntimeError when the launcher cannot start it here, ValueError
    for no rank and for a target, TypeError for a payload of another form.
    """
    require_form(target, payload)
    if world < 1:
        raise ValueError(f"world is {world}: a job has at least one rank")
    started_by = backend(launcher, **(options or {}))
    job = Job(target=target, payload=payload or {}, world=world, environment=environment or {}, debug=debug)
    with Supervisor(job, started_by) as supervisor:
        return supervisor.finish(on_event, deadline)


def require_form(target: str, payload: Mapping[str, Any] | None) -> None:
    """ValueError for a target that is not `module:function`, TypeError for a payload that JSON does not hold."""
    if not all(target.partition(":")):
        raise ValueError(f"job target {target!r}: name a function as package.module:function")
    try:
        json.dumps(payload)
    except TypeError as error:
        raise TypeError(f"payload of job {target}: {error}; legal: numbers, texts, lists and dicts of them") from None


def backend(launcher: str, **options: Any) -> Backend:
    """The launcher of that name. Raises ValueError for an unknown one."""
    require_launcher(launcher)
    return BACKENDS[launcher](**options)


def launcher_options(launcher: str, ray_address: str | None, device: str) -> dict[str, Any]:
    """What the launcher of that name wants to know beside the job."""
    return {"address": ray_address, "device": device} if launcher == "ray" else {}


def require_launcher(launcher: str | None, ray_address: str | None = None) -> None:
    """ValueError for an unknown one, and for a cluster's address that the launcher has no use for. None: local."""
    if launcher not in (None, *LAUNCHERS):
        raise ValueError(f"unknown launcher {launcher!r}; legal: {', '.join(LAUNCHERS)}")
    if ray_address is not None and launcher != "ray":
        raise ValueError(
            f"the Ray address {ray_address!r} has no effect with launcher {launcher or 'local'}: name launcher ray, or "
            "drop the address"
        )
