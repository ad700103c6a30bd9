"""Which Ray cluster a job takes, and where its ranks meet."""

import gc
import itertools
import signal
import socket
import sys
import types
import weakref

import pytest

from shardwise.comm import bootstrap
from shardwise.comm.rank import RankInfo
from shardwise.launch import worker
from shardwise.launch.interrupt import Interrupted, interruptible
from shardwise.launch.job import Job
from shardwise.launch.ray import Ray, serve_store


class Recorder:
    """Stands for the package ray: remembers how it was started."""

    def init(self, address, **options):
        self.address, self.options = address, options


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Recorder()


def test_without_an_address_the_job_has_a_cluster_of_its_own_whatever_else_runs_here(recorder):
    Ray()._connect(recorder, 3)
    assert recorder.address == "local" and recorder.options["num_cpus"] >= 3


def test_an_address_is_that_of_the_option_or_of_the_environment(recorder, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    Ray()._connect(recorder, 3)
    assert recorder.address == "auto" and "num_cpus" not in recorder.options
    monkeypatch.setattr("shardwise.launch.ray._knock", lambda address: None)
    Ray("here:1")._connect(recorder, 3)
    assert recorder.address == "here:1"


def test_a_place_that_ray_cannot_start_in_is_named_with_the_variable_that_moves_it(recorder, monkeypatch):
    def refuse(address, **options):
        raise OSError("AF_UNIX path length cannot exceed 107 bytes")

    monkeypatch.setattr(recorder, "init", refuse)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for name in ("TMPDIR", "RAY_TMPDIR"):  # of which Ray takes the latter where both are set
        monkeypatch.setenv(name, f"/{name}")
        with pytest.raises(ValueError, match=f"^Ray cannot start in /{name} .*107 bytes.: set {name} to another f"):
            Ray()._connect(recorder, 3)


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_cluster_of_the_jobs_own_is_waited_for_where_one_of_others_is_busy(recorder, monkeypatch, address):
    class Group:
        """Stands for Ray's placement group on a slow machine."""

        looks = 0

        def wait(self, seconds):
            self.looks += 1
            return self.looks > 3

    moments = itertools.count(step=6.0)
    recorder.cluster_resources = recorder.available_resources = lambda: {"CPU": 2.0}
    recorder.nodes = list
    library = types.SimpleNamespace(placement_group=lambda *_, **__: Group())
    monkeypatch.setitem(sys.modules, "ray.util.placement_group", library)
    monkeypatch.setattr("shardwise.launch.ray.time", types.SimpleNamespace(monotonic=lambda: next(moments)))
    monkeypatch.setitem(sys.modules, "ray", recorder)
    recorder.is_initialized = lambda: False
    recorder.util = types.SimpleNamespace(get_node_ip_address=lambda: "10.1.2.3")
    backend = Ray(address)
    if address is None:
        backend.prepare(Job(target="a:b", payload={}, world=2))
    else:
        with pytest.raises(RuntimeError, match="the Ray cluster is busy for 2 ranks"):
            backend.prepare(Job(target="a:b", payload={}, world=2))


def test_a_sigterm_while_ray_starts_is_whose_it_was(recorder, monkeypatch):
    def init(address, **options):
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(recorder, "init", init)
    before, ended = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        try:
            Ray()._connect(recorder, 3)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a second one does not disturb the end
            ended.append(True)
    assert ended and signal.getsignal(signal.SIGTERM) is before


def make_a_store(context):
    context.make_store()


def test_what_rank_0_serves_outlives_its_work_as_the_others_may_still_read(monkeypatch):
    """Its process goes on: an actor ends with the job."""
    link = types.SimpleNamespace(**dict.fromkeys(("call_when_lost", "send"), lambda event: None))
    link.closing = link.close = lambda: None
    monkeypatch.setattr(worker, "Link", lambda *_: link)
    monkeypatch.setattr(worker.env, "prepare_rank", lambda info: None)
    monkeypatch.setattr(worker, "_served", [])
    served = []

    class Store:
        def __init__(self, *_):
            served.append(weakref.ref(self))

    description = {"world": 1, "payload": {}, "deadlines": {}, "logs": "", "address": "", "token": ""}
    worker.run_rank({**description, "target": f"{__name__}:make_a_store"}, RankInfo(), Store)
    gc.collect()
    assert served[0]() is not None


class Line:
    """Stands for a rank's link: what was sent, and the parent's answer, which is that same place."""

    def send(self, event):
        self.sent = event

    def commands(self):
        return iter([{"command": "store", **self.sent}])


def test_rank_0_announces_the_address_that_ray_knows_its_node_by(monkeypatch):
    asked = []

    def tcp_store(info, host, port, timeout):
        asked.append(timeout)
        return types.SimpleNamespace(store=types.SimpleNamespace(port=4711))

    monkeypatch.setattr(bootstrap, "tcp_store", tcp_store)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.1.2.3")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setenv("SHARDWISE_DEADLINE_RENDEZVOUS", "33")
    link = Line()
    serve_store(RankInfo(0, 2, 0, 1), link)
    assert (link.sent["host"], link.sent["port"], asked) == ("10.1.2.3", 4711, [33])
