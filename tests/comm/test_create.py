"""Which transport `create` makes, what it rides on, what it refuses and how."""

import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardwise.comm import strategy, torch_dist, torch_group
from shardwise.comm.base import STRATEGIES, Unavailable
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.strategy import create
from shardwise.testing import run_processes, run_threads


def test_create_says_what_is_legal():
    with pytest.raises(ValueError, match="unknown transport 'smoke'.*gloo.*threads"):
        create(RankInfo(), transport="smoke")
    with pytest.raises(Unavailable, match="nccl moves CUDA tensors, the group is for device cpu: give device cuda"):
        create(RankInfo(0, 2, 0, 2), transport="nccl")
    with pytest.raises(Unavailable, match="run_threads"):
        create(RankInfo(0, 2, 0, 2), transport="threads")


def test_one_rank_does_not_claim_to_be_asked_for_by_name():
    assert "no peers" in create(RankInfo()).why()
    assert "by name" in create(RankInfo(), transport="fake").why()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(Unavailable, match="no CUDA device"):
        create(RankInfo(0, 2, 0, 2), device="cuda", store=object())


def test_a_check_switch_that_is_no_switch_is_refused(monkeypatch):
    monkeypatch.setenv("SHARDWISE_CHECK", "maybe")
    with pytest.raises(ValueError, match="SHARDWISE_CHECK='maybe'"):
        create(RankInfo())


@pytest.mark.parametrize("name", ["UB", "MNNVL", "NCCL_SYMMETRIC", "SYMM_MEM"])
def test_a_strategy_that_cannot_run_here_is_the_users_choice_to_change(name):
    def body():
        with pytest.raises(Unavailable, match=f"strategy {name}"):
            current_groups().world.all_reduce(torch.ones(2), strategy=name)

    run_threads(2, body)


def test_a_rank_alone_takes_the_strategies_that_need_no_device():
    group, ran = create(RankInfo()), []
    for name in STRATEGIES:
        try:
            group.all_reduce(torch.ones(2), strategy=name)
            ran.append(name)
        except Unavailable as error:
            assert name in str(error)
    assert sorted(ran) == ["AUTO", "MIN_LATENCY", "NCCL", "ONESHOT", "TWOSHOT"]
    with pytest.raises(ValueError, match="unknown strategy 'FASTEST'; legal: NCCL.*SYMM_MEM"):
        group.all_reduce(torch.ones(2), strategy="FASTEST")


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_transport_serves_one_rank_without_a_rendezvous(transport):
    group = create(RankInfo(), transport=transport)
    assert group.transport == transport
    assert torch.equal(group.all_reduce(torch.ones(3)), torch.ones(3))
    assert torch.equal(group.all_gather(torch.ones(3, 2), 1, [2]), torch.ones(3, 2))
    group.close()


def test_a_group_that_is_closed_leaves_those_beside_it_and_the_last_one_leaves_nothing():
    first, second = (create(RankInfo(), transport="gloo") for _ in range(2))
    first.close()
    assert dist.is_initialized() and torch.equal(second.all_reduce(torch.ones(2)), torch.ones(2))
    second.close()
    assert not dist.is_initialized()


def test_a_group_that_does_not_end_says_what_may_keep_it(monkeypatch):
    """As NCCL's does, while a graph holds its calls."""
    group, leave = create(RankInfo(), transport="gloo"), torch_dist.leave
    monkeypatch.setattr(torch_dist, "leave", lambda *arguments: leave(*arguments) and False)
    with pytest.warns(UserWarning, match="group world was not closed within 10 s: if a CUDA graph .* delete the graph"):
        group.close()


def test_threads_that_make_groups_at_the_same_time_get_the_names_they_gave(monkeypatch):
    """Neither waits for the other, which on another rank may come first; other groups keep torch's names."""
    inside = threading.Barrier(2, timeout=60)

    def named_by_torch(ranks=(0, 1)):
        return distributed_c10d._process_group_name(list(ranks), use_hashed_name=True)

    def make(ranks, **_):
        inside.wait()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(named_by_torch).result() == usual
        return named_by_torch(ranks)

    usual = named_by_torch()
    monkeypatch.setattr(dist, "new_group", make)
    with ThreadPoolExecutor(2) as threads:
        names = list(threads.map(lambda name: torch_group.new_group([0, 1], "gloo", name), ["one", "two"]))
    assert names == ["one", "two"]
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torch_group.new_group([0, 1], "gloo", "three")
    assert named_by_torch() == usual


def test_an_existing_process_group_is_ridden_on():
    for result in run_processes(2, "rank_bodies:adopt_process_group"):
        assert result == {
            "gloo": "group world of 2: gloo (asked for by name)",
            "auto": "group world of 2: shm (2 ranks on one host, Linux on x86-64)",
            "sums": [3.0, 3.0, 3.0],
            "routed": [[21.0, 21.0]],
            "fake": (2, 2),
            "still there": True,
        }


def test_a_process_group_of_another_backend_gets_a_gloo_group_beside_it():
    assert run_processes(2, "rank_bodies:adopt_group_of_another_backend") == [("gloo", 3.0, False, False)] * 2


@pytest.mark.parametrize(
    "config, gloo, nccl",
    [("cpu:gloo,cuda:gloo", True, False), ("cuda:nccl", False, True), ("cpu:gloo,cuda:nccl", True, True)],
)
def test_a_process_group_is_ridden_on_by_the_backend_of_the_device(monkeypatch, config, gloo, nccl):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: config)
    assert (torch_group.serves(None, "gloo"), torch_group.serves(None, "nccl")) == (gloo, nccl)


def test_an_existing_mpi_communicator_is_ridden_on():
    results = run_processes(3, "rank_bodies:adopt_mpi_communicator", mpi=True)
    for rank, (whole, parts) in enumerate(results):
        assert whole == [((0, 1, 2), 6.0), ((0, 1, 2), 6.0)]
        assert parts == [(1, 2) if rank else (0,)] * 2, "a part names its members by their ranks in the world"


class Singleton:
    """COMM_WORLD of a process that mpirun did not start."""

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 1


def test_mpi_is_refused_to_ranks_that_mpirun_did_not_start(monkeypatch):
    monkeypatch.setattr("shardwise.comm.mpi_library.world_communicator", Singleton)
    with pytest.raises(Unavailable, match="mpirun.*torchrun says rank 1 of 2, MPI says rank 0 of 1"):
        create(RankInfo(1, 2, 1, 2, source="torchrun"), transport="mpi")


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


def test_importing_comm_neither_imports_torch_nor_starts_mpi():
    code = (
        "import sys, shardwise.comm.strategy, shardwise.comm.watch, shardwise.comm.rank, shardwise.comm.bootstrap\n"
        "assert 'torch' not in sys.modules\n"
        "import shardwise.comm.mpi\n"
        "assert 'mpi4py' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
