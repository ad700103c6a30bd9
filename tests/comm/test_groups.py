"""Groups: mesh axes, choice of a transport, rendezvous, deadlines, ranks as threads."""

import errno
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

from shardwise.comm import arrival, strategy, torch_group, watch
from shardwise.comm.base import STRATEGIES, CollectiveTimeout, CommError, NotHere
from shardwise.comm.bootstrap import (
    FolderStore,
    StoreRendezvous,
    own_address,
    require_reachable,
    store_from_environment,
)
from shardwise.comm.fake import FakeCommunicator
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.segment import share
from shardwise.comm.strategy import create, make_groups
from shardwise.comm.watch import Deadlines
from shardwise.sharding.layout import ParallelLayout
from shardwise.testing import RankFailed, run_processes, run_threads

AXES = ("tp", "attn_dp", "moe_tp", "moe_ep")


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp=8, moe_ep=4),
        ParallelLayout(tp=2, attn_dp=4, moe_ep=8),
        ParallelLayout(tp=4, attn_dp=2, moe_ep=2),
        ParallelLayout(tp=1, attn_dp=8),
    ],
    ids=str,
)
def test_mesh_groups_hold_the_ranks_that_the_layout_says(layout):
    def body():
        groups = current_groups()
        me = layout.coordinates(groups.world.rank)
        for axis in AXES:
            group = getattr(groups, axis)
            other = {"tp": "attn_dp", "attn_dp": "tp", "moe_tp": "moe_ep", "moe_ep": "moe_tp"}[axis]
            members = [
                rank for rank in range(layout.world) if getattr(layout.coordinates(rank), other) == getattr(me, other)
            ]
            assert group.ranks == tuple(members), axis
            assert group.rank == getattr(me, axis) and group.size == getattr(layout, axis)
            assert group.all_reduce(torch.tensor([groups.world.rank])).item() == sum(members)

    run_threads(layout.world, body, layout=layout)


def test_axes_with_the_same_members_share_a_communicator():
    def body():
        groups = current_groups()
        return groups.tp is groups.world, groups.moe_tp is groups.world, groups.attn_dp.size

    assert run_threads(2, body) == [(True, True, 1)] * 2


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(ValueError, match="tp 4 times attn_dp must be the world of 2; legal tp: 1 2"):
        run_threads(2, lambda: None, layout=ParallelLayout(tp=4))


def test_groups_are_of_the_thread_and_gone_afterwards():
    assert run_threads(3, lambda: current_groups().world.rank) == [0, 1, 2]
    assert current_groups() is None


def test_run_threads_raises_the_first_exception_and_ends_the_others():
    def body():
        if current_groups().world.rank == 1:
            raise SystemExit(7)
        current_groups().world.barrier()

    with pytest.raises(SystemExit):
        run_threads(3, body)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_fake_gives_shapes_of_any_world():
    group = FakeCommunicator(3, range(8))
    x = torch.ones(2, 16)
    assert group.all_gather(x, 1).shape == (2, 128)
    assert group.all_gather(x, 0, [1, 1, 1, 2, 1, 1, 1, 1]).shape == (9, 16)
    assert group.reduce_scatter(x, 1).shape == (2, 2)
    assert group.all_to_all(torch.ones(8, 3), [1] * 8, [2] * 8).shape == (16, 3)
    groups = make_groups(group, ParallelLayout(tp=4, attn_dp=2, moe_ep=4))
    assert (groups.tp.ranks, groups.attn_dp.ranks) == ((0, 1, 2, 3), (3, 7))
    assert (groups.moe_ep.ranks, groups.moe_tp.ranks) == ((0, 1, 2, 3), (3, 7))
    assert torch.equal(groups.tp.all_reduce(x), 4 * x)


def test_create_says_what_is_legal():
    with pytest.raises(ValueError, match="unknown transport 'smoke'.*gloo.*threads"):
        create(RankInfo(), transport="smoke")
    with pytest.raises(NotHere, match="nccl moves CUDA tensors, the group is for device cpu: give device cuda"):
        create(RankInfo(0, 2, 0, 2), transport="nccl")
    with pytest.raises(NotHere, match="run_threads"):
        create(RankInfo(0, 2, 0, 2), transport="threads")


def test_ranks_without_a_rendezvous_are_told_how_to_get_one():
    with pytest.raises(NotHere, match="MASTER_ADDR.*torchrun or mpirun"):
        store_from_environment(RankInfo(1, 2, 1, 2), 1.0, environ={})


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "1.5"])
def test_a_port_that_is_none_is_refused_by_the_name_of_its_variable(port):
    with pytest.raises(ValueError, match=f"MASTER_PORT='{port}'"):
        store_from_environment(RankInfo(1, 2, 1, 2), 1.0, {"MASTER_ADDR": "here", "MASTER_PORT": port})


@pytest.mark.parametrize("name", ["UB", "MNNVL", "NCCL_SYMMETRIC", "SYMM_MEM"])
def test_a_strategy_that_cannot_run_here_is_the_users_choice_to_change(name):
    def body():
        with pytest.raises(NotHere, match=f"strategy {name}"):
            current_groups().world.all_reduce(torch.ones(2), strategy=name)

    run_threads(2, body)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(NotHere, match="no CUDA device"):
        create(RankInfo(0, 2, 0, 2), device="cuda", store=object())


def test_every_strategy_name_parses(tmp_path):
    group = create(RankInfo())
    for name in STRATEGIES:
        try:
            group.all_reduce(torch.ones(2), strategy=name)
        except CommError as error:
            assert name in str(error)


def test_a_rendezvous_names_who_did_not_come(tmp_path):
    meeting = StoreRendezvous(FolderStore(tmp_path), 1, range(4))
    FolderStore(tmp_path).set("world/hello/3", b"null")
    begin = time.monotonic()
    with pytest.raises(CollectiveTimeout, match=r"rank 1: rank\(s\) 0, 2 did not arrive within 0.2 s") as caught:
        meeting.gather("hello", None, 0.2)
    assert caught.value.missing == (0, 2)
    assert time.monotonic() - begin < 2


class Route:
    """Stands for a UDP socket of a host whose interface is 10.1.2.3."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def connect(self, place):
        self.place = place

    def getsockname(self):
        return "10.1.2.3", 40000


def test_a_host_announces_its_interface_even_where_its_name_is_loopback(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: Route())
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert own_address() == "10.1.2.3"


def test_a_host_without_a_way_out_goes_by_its_name(monkeypatch):
    def unreachable(self, place):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", lambda *_: Route())
    monkeypatch.setattr(Route, "connect", unreachable)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert own_address() == "127.0.1.1"


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1", "localhost", "::1"])
def test_a_loopback_address_serves_one_host_only(address):
    require_reachable(address, ["a", "a"])
    require_reachable("10.1.2.3", ["a", "b"])
    require_reachable("node-7", ["a", "b"])
    with pytest.raises(CommError, match=f"announces the address {address}.*a, b.*MASTER_ADDR"):
        require_reachable(address, ["a", "a", "b"])


def test_what_lies_in_a_store_is_read_as_data_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    store = FolderStore(tmp_path)
    store.set("world/hello/1", pickle.dumps(Trap()))
    with pytest.raises(CommError, match="for rank 1 is no JSON"):
        StoreRendezvous(store, 0, range(2)).gather("hello", None, 1.0)
    assert not (tmp_path / "sprung").exists()


def test_a_store_gives_back_what_the_ranks_put_in(tmp_path):
    value = ("host \u00e4 \udc80", 1 << 63, None, True, (1.5, ()))
    store = FolderStore(tmp_path)
    StoreRendezvous(store, 1, range(2)).store.set("world/facts/1", json.dumps(value).encode())
    assert StoreRendezvous(store, 0, range(2)).gather("facts", value, 1.0) == [value, value]


def test_a_folder_store_gives_back_any_key(tmp_path):
    store = FolderStore(tmp_path / "new")
    store.set("a/b c:%", b"\0value")
    assert store.get("a/b c:%", 0.1) == b"\0value"
    with pytest.raises(TimeoutError, match="key 'other'"):
        store.get("other", 0.05)


def test_deadlines_come_from_the_environment():
    assert Deadlines.from_environment({"SHARDWISE_DEADLINE_COLLECTIVE": "7.5"}).collective == 7.5
    for text in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="SHARDWISE_DEADLINE_LOAD"):
            Deadlines.from_environment({"SHARDWISE_DEADLINE_LOAD": text})


def test_collectives_wait_longer_while_weights_are_read():
    deadlines = Deadlines(collective=1, load=50)
    with watch.phase("load"):
        assert deadlines.in_phase(watch.current_phase()) == 50
    assert deadlines.in_phase(watch.current_phase()) == 1


def test_a_check_switch_that_is_no_switch_is_refused(monkeypatch):
    monkeypatch.setenv("SHARDWISE_CHECK", "maybe")
    with pytest.raises(ValueError, match="SHARDWISE_CHECK='maybe'"):
        create(RankInfo())


def test_importing_comm_neither_imports_torch_nor_starts_mpi():
    code = (
        "import sys, shardwise.comm.strategy, shardwise.comm.watch, shardwise.comm.rank, shardwise.comm.bootstrap\n"
        "assert 'torch' not in sys.modules\n"
        "import shardwise.comm.mpi\n"
        "assert 'mpi4py' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_existing_process_group_is_ridden_on():
    for result in run_processes(2, "rank_bodies:adopt_process_group"):
        assert result == {
            "gloo": "group world of 2: gloo (asked for by name)",
            "auto": "group world of 2: shm (2 ranks on one host, Linux on x86-64)",
            "sums": [3.0, 3.0, 3.0],
            "fake": (2, 2),
            "still there": True,
        }


def test_an_existing_mpi_communicator_is_ridden_on():
    results = run_processes(3, "rank_bodies:adopt_mpi_communicator", mpi=True)
    for rank, (whole, parts) in enumerate(results):
        assert whole == [((0, 1, 2), 6.0), ((0, 1, 2), 6.0)]
        assert parts == [(1, 2) if rank else (0,)] * 2, "a part names its members by their ranks in the world"


def test_a_process_group_of_another_backend_gets_a_gloo_group_beside_it():
    assert run_processes(2, "rank_bodies:adopt_group_of_another_backend") == [("gloo", 3.0, False, False)] * 2


@pytest.mark.parametrize(
    "config, gloo, nccl",
    [("cpu:gloo,cuda:gloo", True, False), ("cuda:nccl", False, True), ("cpu:gloo,cuda:nccl", True, True)],
)
def test_a_process_group_is_ridden_on_by_the_backend_of_the_device(monkeypatch, config, gloo, nccl):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: config)
    assert (torch_group.serves(None, "gloo"), torch_group.serves(None, "nccl")) == (gloo, nccl)


class Singleton:
    """COMM_WORLD of a process that mpirun did not start."""

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 1


def test_mpi_is_refused_to_ranks_that_mpirun_did_not_start(monkeypatch):
    monkeypatch.setattr("shardwise.comm.mpi.world_communicator", Singleton)
    with pytest.raises(NotHere, match="mpirun.*torchrun says rank 1 of 2, MPI says rank 0 of 1"):
        create(RankInfo(1, 2, 1, 2, source="torchrun"), transport="mpi")


class LateComm:
    """Stands for an MPI communicator whose barrier is over at second 5 of a clock that moves by a look or a sleep."""

    now = 0.0
    tests = 0

    def Dup(self):
        return self

    def Get_rank(self):
        return 0

    Get_size = Ibarrier = Iprobe = lambda self, **_: None

    def monotonic(self):
        self.now += 1e-3
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def Test(self):
        self.tests += 1
        return self.now > 5 or self.tests > 100_000


def test_a_rank_that_waits_long_for_ranks_of_other_hosts_leaves_its_core(monkeypatch):
    comm = LateComm()
    comm.Ibarrier = lambda: comm
    monkeypatch.setattr(arrival, "_owned", [])
    monkeypatch.setattr(arrival, "time", comm)
    arrival.MessageArrivals(comm).meet(60.0)
    assert comm.now > 5 and comm.tests < 10_000


def test_a_default_group_made_anew_is_not_the_old_one(monkeypatch):
    monkeypatch.setattr(strategy, "default_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(strategy, "_defaults", {})
    made = []
    monkeypatch.setattr(strategy, "create", lambda info, device, process_group: made.append(process_group) or len(made))
    for group, expected in (("old", 1), ("old", 1), ("new", 2)):
        monkeypatch.setattr(torch.distributed, "group", types.SimpleNamespace(WORLD=group))
        assert strategy.default_group("cpu") == expected
    assert strategy._defaults["cpu"][0] == "new", "the old group is let go, the new one is held: its id stays its own"


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_transport_serves_one_rank_without_a_rendezvous(transport):
    group = create(RankInfo(), transport=transport)
    assert group.transport == transport
    assert torch.equal(group.all_reduce(torch.ones(3)), torch.ones(3))
    assert torch.equal(group.all_gather(torch.ones(3, 2), 1, [2]), torch.ones(3, 2))
    group.close()


def test_one_store_serves_several_groups():
    assert run_processes(2, "rank_bodies:create_twice") == [[3.0, 30.0, 300.0]] * 2


def test_run_processes_tells_which_rank_failed_and_why():
    with pytest.raises(RankFailed, match="KeyError: 'no such thing'") as caught:
        run_processes(2, "rank_bodies:rank_1_fails")
    assert caught.value.rank == 1


def test_memory_that_cannot_be_made_is_every_ranks_error(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "too many open files")

    def body():
        world = current_groups().world
        with pytest.raises(OSError, match="too many open files.*could not make the memory"):
            share(lambda key, value: world.all_gather_object(value), [0, 1], world.rank, 64, key="test")

    monkeypatch.setattr(os, "memfd_create", refuse)
    run_threads(2, body)


def test_one_rank_does_not_claim_to_be_asked_for_by_name():
    assert "no peers" in create(RankInfo()).why()
    assert "by name" in create(RankInfo(), transport="fake").why()
