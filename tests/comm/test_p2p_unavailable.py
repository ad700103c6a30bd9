"""Where GPUs or the package triton are missing, every rank learns which rank cannot, and why."""

import importlib.util

import pytest
import torch

from shardwise.comm.p2p.communicator import P2PCommunicator, create
from shardwise.comm.p2p.delegate import Delegating, WithoutKernels
from shardwise.comm.p2p.workspace import P2PUnavailable
from shardwise.comm.rank import current_groups
from shardwise.comm.strategy import make_groups
from shardwise.sharding.layout import ParallelLayout
from shardwise.testing import run_threads

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA devices")


@without_cuda
def test_without_a_gpu_every_rank_is_told_why():
    def body():
        with pytest.raises(P2PUnavailable, match="rank 0, 1: ") as caught:
            P2PCommunicator.connect(current_groups().world)
        return str(caught.value)

    first, second = run_threads(2, body)
    assert first == second


@without_cuda
def test_the_fallback_group_serves_and_says_the_reason():
    def body():
        group = P2PCommunicator.or_fallback(current_groups().world)
        assert group.all_reduce(torch.tensor([group.rank + 1])).item() == 3
        return group.why()

    assert "group world of 2: threads (GPU peer-to-peer is not available" in run_threads(2, body)[0]


class Kernels(Delegating):
    """Stands for a group on peer memory."""

    devices = ("cpu",)

    def _split(self, name, members, colors, keys):
        return pairs_and_fours(self._split_fallback(name, colors, keys))


def pairs_and_fours(fallback):
    return Kernels(fallback, "p2p") if fallback.size in (2, 4) else WithoutKernels(fallback, "no", pairs_and_fours)


@pytest.mark.parametrize(
    ("layout", "transports"),
    [
        (ParallelLayout(tp=2, attn_dp=3), {"tp": "p2p", "attn_dp": "threads", "moe_tp": "threads"}),
        (ParallelLayout(tp=6, moe_ep=3), {"tp": "threads", "moe_tp": "p2p", "moe_ep": "threads"}),
    ],
    ids=str,
)
def test_a_world_of_six_leaves_its_pairs_to_the_kernels(layout, transports):
    def body():
        groups = make_groups(pairs_and_fours(current_groups().world), layout)
        for axis, transport in transports.items():
            group = getattr(groups, axis)
            assert group.transport == transport
            assert group.all_reduce(torch.tensor([groups.world.rank])).item() == sum(group.ranks)
            assert group.name == group.fallback.name, "messages of both name the group alike"
        groups.world.close()
        return groups.transports

    assert set(run_threads(6, body)) == {" + ".join(dict.fromkeys(transports.values()))}


def test_beneath_a_broken_group_none_waits_for_its_members():
    def body():
        world = pairs_and_fours(current_groups().world)
        pair = world.split(world.rank // 2)
        world.broken = "a wait gave up"  # as a group on peer memory finds by itself
        world.close()
        return {group.broken for group in (world, world.fallback, pair, pair.fallback)}

    assert run_threads(6, body) == [{"a wait gave up"}] * 6


def test_without_triton_it_is_the_reason(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest)
    )

    def body():
        with pytest.raises(P2PUnavailable, match="the package triton, which compiles the kernels, is not installed"):
            create(current_groups().world)

    run_threads(2, body)


def test_flashinfer_says_what_it_lacks():
    def body():
        with pytest.raises(P2PUnavailable, match="rank 0: "):
            create(current_groups().world, transport="flashinfer")

    run_threads(2, body)


def test_an_unknown_transport_is_refused_with_the_legal_ones():
    def body():
        with pytest.raises(ValueError, match="legal: p2p, flashinfer"):
            create(current_groups().world, transport="carrier pigeon")

    run_threads(2, body)
