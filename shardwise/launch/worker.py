"""The body of every rank that a launcher of ours starts: `python -m shardwise.launch.worker JOB_FOLDER`

Order matters: be bound to the parent's life, have a log, know the rank, then report — all before the job's own
function is imported, so that a rank that dies early is a named one.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shardwise.comm import watch
from shardwise.comm.bootstrap import STORE_ENV
from shardwise.comm.rank import RankInfo
from shardwise.comm.watch import Deadlines
from shardwise.launch import env, guard
from shardwise.launch.guard import Guard
from shardwise.launch.link import Link
from shardwise.launch.neighbours import Neighbours


@dataclass(frozen=True)
class RankContext:
    """What a job's function gets: who it is, what to do, and the link to the parent."""

    info: RankInfo
    payload: dict
    deadlines: Deadlines
    guard: Guard
    link: Link | None
    """None where the ranks were started by the user's own torchrun or mpirun."""
    make_store: Callable[[], Any] | None = None
    """Makes the rendezvous for `comm.strategy.create` where the environment does not name one."""
    on_event: Callable[[dict], None] = lambda event: None

    def emit(self, event: str, **values: Any) -> None:
        """Tell the parent something: JSON values."""
        if self.link is not None:
            self.link.send({"event": event, **values})
        else:
            self.on_event({"event": event, "rank": self.info.rank, **values})

    def phase(self, name: str):
        """Context manager: name what this rank does, for reports."""
        return self.guard.phase(name)

    def communicator(self, *, device: str = "cpu", transport: str = "auto"):
        """The world group of this rank."""
        from shardwise.comm.strategy import create

        with self.phase("rendezvous"):
            store = self.make_store() if self.make_store else None
            return create(self.info, transport=transport, device=device, store=store, deadlines=self.deadlines)


def main(folder: Path) -> None:
    """Run the job that `folder/job.json` describes, as the rank that the environment names; does not return."""
    description = json.loads((folder / "job.json").read_text())
    guard.bind_to_parent(tuple(description["supervisor"]))
    info = env.detect()
    own_log(Path(description["logs"]) / f"rank-{info.rank}.log")
    guard.report_crashes()
    run_rank(description, info)
    leave()


def run_rank(description: dict, info: RankInfo, make_store: Callable[[RankInfo, Link], Any] | None = None) -> None:
    """Report to the parent, run the job's function in the guard, say how it went."""
    env.prepare_rank(info)
    link = Link(description["address"], description["token"], info.rank)
    own_guard = Guard(info, Path(description["logs"]), link)
    link.call_when_lost(lambda: os._exit(128 + signal.SIGKILL))

    def store() -> Any:
        assert make_store is not None
        _served.append(make_store(info, link))
        return _served[-1]

    def body() -> Any:
        if info.world != description["world"]:
            raise ValueError(
                f"{info.source} started {info.world} ranks, but the job was planned for {description['world']}"
            )
        context = RankContext(
            info=info,
            payload=description["payload"],
            deadlines=Deadlines(**description["deadlines"]),
            guard=own_guard,
            link=link,
            make_store=store if make_store else None,
        )
        return resolve(description["target"])(context)

    value = own_guard.run(body)
    link.closing()
    link.send({"event": "done", "value": value})
    link.close()


_served: list[Any] = []
"""Rank 0's store outlives its own work, until the process ends: the others may still read."""


def context_here(info: RankInfo, payload: dict, on_event: Callable[[dict], None]) -> RankContext:
    """Of this process, a rank that the user's own launcher started. Call it before torch is imported."""
    env.prepare_rank(info)
    folder = guard.job_folder(info)
    if info.source == "Slurm" and info.world == info.local_world:  # srun brings no rendezvous of its own
        os.environ.setdefault(STORE_ENV, str(folder / f"store-{env.slurm_step()}"))  # the folder may be of many jobs
    deadlines = Deadlines.from_environment()
    return RankContext(info, payload, deadlines, Guard(info, folder), link=None, on_event=on_event)


def run_here(info: RankInfo, body: Callable[[], object], *, debug: bool) -> NoReturn:
    """`body` in the guard of this process, a rank that the user's own launcher started; then the process ends."""
    own_guard = Guard(info, guard.job_folder(info), debug=debug)
    guard.bind_to_parent()
    guard.report_crashes()
    others = Neighbours(own_guard)
    others.join()
    own_guard.run(body)
    others.leave()
    leave()


def resolve(target: str) -> Callable[[RankContext], Any]:
    """The function that `module:name` names. Raises ValueError when there is none."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if function is None:
        raise ValueError(f"job target {target!r}: module {module} has no function {name!r}")
    return function


def own_log(path: Path) -> None:
    """This rank's stdout and stderr, those of C libraries too, go to its log."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def leave() -> NoReturn:
    """End a rank that finished its work: MPI must be finalised, nothing else is worth the wait."""
    with watch.phase("stop"):
        guard.finalize(Deadlines.from_environment().stop)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
