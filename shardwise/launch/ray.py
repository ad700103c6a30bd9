"""Ranks as Ray actors: one placement group, one actor a rank, demo mode's collectives among them."""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from shardwise.comm.rank import RankInfo
from shardwise.comm.watch import Deadlines
from shardwise.launch import env
from shardwise.launch.backend import Backend
from shardwise.launch.job import Job, rank_environment
from shardwise.launch.link import Link
from shardwise.parallel.options import DEVICES, require_known

KNOCK_SECONDS = 10.0
"""How long a host of an address HOST:PORT may take to accept a connection."""
EXPLAIN_AFTER = 8.0
"""Seconds after which waiting for resources that others may hold ends with a reason, though they may come free later.
In a cluster of the job's own nobody holds any: it gets what ranks get to start."""
_EXIT_CODE = re.compile(r"exit code[ =](\d+)", re.IGNORECASE)


class Shortage(RuntimeError):
    """A cluster has too little for the ranks, or is busy with others."""


class Ray(Backend):
    """Uses the Ray that this process is connected to, the cluster at `address` or RAY_ADDRESS, or a new one here."""

    name = "ray"

    def __init__(self, address: str | None = None, device: str = "auto"):
        if not isinstance(address, str | None):
            raise TypeError(f"the Ray address is {address!r:.60}, expected a text such as auto or HOST:PORT")
        require_known("device", device, DEVICES)
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._device = device
        self._own_connection = False
        self._group: Any = None
        self._actors: list[Any] = []
        self._ended: dict[int, int | None] = {}
        self._killed: set[int] = set()
        """Ranks that ended because we said so: their ends explain nothing."""
        self._ends: list[int] = []
        """By rank, a descriptor that becomes readable when its actor has ended."""
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    def prepare(self, job: Job) -> None:
        try:
            import ray
        except ImportError:
            raise FileNotFoundError("the package ray is not installed: pip install ray") from None
        if not ray.is_initialized():
            self._connect(ray, job.world)
        self.tcp_host = ray.util.get_node_ip_address() if self._address else "127.0.0.1"
        self._bundle = self._resources(ray, job.world)
        alone = self._own_connection and not self._address
        self._reserve(ray, job.world, job.deadlines.start if alone else EXPLAIN_AFTER)

    def _connect(self, ray: Any, world: int) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        with _sigterm_kept():
            if self._address:
                try:
                    _knock(self._address)
                    ray.init(address=self._address, **quiet)
                except (OSError, ValueError) as error:  # ValueError: it has no such form
                    token = "" if "RAY_AUTH_MODE" in os.environ else "set RAY_AUTH_MODE=token if it wants its token, "
                    raise ValueError(
                        f"no Ray cluster lets us in at the address {self._address!r} ({error}): start one "
                        f"(ray start --head), {token}or leave the address out and one is started for this job"
                    ) from None
            else:
                own = {"num_cpus": max(world, len(os.sched_getaffinity(0))), "include_dashboard": False}
                try:
                    ray.init("local", **own, **quiet)  # also beside somebody else's cluster
                except OSError as error:  # of its files and sockets
                    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"  # in Ray's order
                    place = os.environ.get(name, "/tmp")
                    raise ValueError(f"Ray cannot start in {place} ({error}): set {name} to another folder") from None
        self._own_connection = True

    def _resources(self, ray: Any, world: int) -> dict[str, float]:
        """What one rank takes: a GPU where every rank can have one, or where GPUs were asked for."""
        gpus = ray.cluster_resources().get("GPU", 0)
        wants = self._device == "cuda" or (self._device == "auto" and gpus >= world)
        return {"CPU": 1.0, "GPU": 1.0} if wants else {"CPU": 1.0}

    def _reserve(self, ray: Any, world: int, patience: float) -> None:
        from ray.util.placement_group import placement_group

        self._group = placement_group([dict(self._bundle)] * world, strategy="PACK")
        end = time.monotonic() + patience
        late = False
        while not self._group.wait(0.5):
            total = ray.cluster_resources()
            never = any(total.get(name, 0) < amount * world for name, amount in self._bundle.items())
            if never or late:
                raise Shortage(self._shortage(ray, world, "has too little" if never else "is busy"))
            late = time.monotonic() > end

    def _shortage(self, ray: Any, world: int, why: str) -> str:
        wanted = ", ".join(f"{amount * world:g} {name}" for name, amount in self._bundle.items())
        free = ray.available_resources()
        nodes = [
            f"{node['NodeManagerHostname']}: "
            + ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in self._bundle)
            for node in ray.nodes()
            if node["Alive"]
        ]
        available = ", ".join(f"{free.get(name, 0):g} {name}" for name in self._bundle)
        return (
            f"the Ray cluster {why} for {world} ranks: wanted {wanted}, free {available} "
            f"(nodes: {'; '.join(nodes)}); use fewer ranks or a larger cluster"
        )

    def start(self, job: Job, description: dict) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        variables = {name: text for name, text in rank_environment(job).items() if _travels(name)}
        variables |= {"PYTHONPATH": rank_environment(job)["PYTHONPATH"], **env.NO_MULTICAST, **job.environment}
        cls = ray.remote(RankActor)
        for rank in range(job.world):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            actor = cls.options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                scheduling_strategy=strategy,
                runtime_env={"env_vars": variables},
            ).remote()
            self._actors.append(actor)
        places = _places(ray, self._group, job.world)
        self._ends = [os.eventfd(0) for _ in range(job.world)]
        refs = {
            actor.run.remote(description, info): info.rank for actor, info in zip(self._actors, places, strict=True)
        }
        self._watcher = threading.Thread(target=self._watch, args=(ray, refs), daemon=True)
        self._watcher.start()

    def _watch(self, ray: Any, refs: dict[Any, int]) -> None:
        """Record each actor's own end: the error that Ray shows first is often a victim's."""
        left = list(refs)
        while left and not self._closing.is_set():
            done, left = ray.wait(left, num_returns=1, timeout=0.2)
            for ref in done:
                self._ended[refs[ref]] = _exit_code(ray, ref)
                os.eventfd_write(self._ends[refs[ref]], 1)

    def sentinels(self) -> list[int]:
        return self._ends

    def exits(self) -> dict[int, int | None]:
        ended = self._ended.copy()  # the watching thread adds to it
        return {rank: code for rank, code in ended.items() if rank not in self._killed}

    def running(self) -> bool:
        return len(self._ended) < len(self._actors)

    def signal(self, signum: int) -> None:
        import ray

        for rank, actor in enumerate(self._actors):
            if rank not in self._ended:
                self._killed.add(rank)
                ray.kill(actor)

    def close(self) -> None:
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        for descriptor in self._ends:
            os.close(descriptor)
        self._ends = []
        if self._group is not None:
            import ray

            ray.util.remove_placement_group(self._group)
            self._group = None
            if self._own_connection:
                ray.shutdown()


class RankActor:
    """One rank; the worker's body runs in its main thread."""

    def run(self, description: dict, info: RankInfo) -> None:
        from shardwise.launch import guard, worker

        guard.bind_to_parent()
        os.environ.update(env.rank_variables(info))
        guard.report_crashes()
        worker.run_rank(description, info, serve_store)


def serve_store(info: RankInfo, link: Link) -> Any:
    """torch's TCPStore on rank 0, at a port that the system picks; the parent tells the others where it is."""
    import ray

    from shardwise.comm.bootstrap import tcp_store

    limit = Deadlines.from_environment().rendezvous
    store = None
    if info.rank == 0:
        store = tcp_store(info, "0.0.0.0", 0, limit)
        link.send({"event": "store", "host": ray.util.get_node_ip_address(), "port": store.store.port})
    where = next(link.commands())
    return store or tcp_store(info, where["host"], where["port"], limit)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts a handler of SIGTERM in place, which exits with code 15: whoever had it has it again, and gets what came
    meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """OSError where nothing listens at HOST:PORT; Ray itself would try for many minutes, deaf to Ctrl-C."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def _places(ray: Any, group: Any, world: int) -> list[RankInfo]:
    nodes = [ray.util.placement_group_table(group)["bundles_to_node_id"][rank] for rank in range(world)]
    order = list(dict.fromkeys(nodes))
    sizes = Counter(nodes)
    return [
        RankInfo(rank, world, nodes[:rank].count(node), sizes[node], order.index(node), source="Ray")
        for rank, node in enumerate(nodes)
    ]


def _exit_code(ray: Any, ref: Any) -> int | None:
    try:
        ray.get(ref)
        return 0
    except ray.exceptions.RayActorError as error:
        match = _EXIT_CODE.search(str(error))
        return int(match[1]) if match else None
    except ray.exceptions.RayError:
        return 1


def _travels(name: str) -> bool:
    return name.startswith(("SHARDWISE_", "NCCL_", "TORCH_", "CUDA_HOME", "OMP_"))
