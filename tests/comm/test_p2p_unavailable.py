"""Where GPUs or the package triton are missing, every rank learns which rank cannot, and why."""

import importlib.util

import pytest
import torch

from shardwise.comm.p2p.communicator import P2PCommunicator, create
from shardwise.comm.p2p.workspace import P2PUnavailable
from shardwise.comm.rank import current_groups
from shardwise.testing import run_threads

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA devices")


@without_cuda
def test_without_a_gpu_every_rank_is_told_why():
    def body():
        with pytest.raises(P2PUnavailable, match="rank 0: .*; rank 1: ") as caught:
            P2PCommunicator.connect(current_groups().world)
        return str(caught.value)

    first, second = run_threads(2, body)
    assert first == second


@without_cuda
def test_the_fallback_group_serves_and_says_the_reason():
    def body():
        world = current_groups().world
        group = P2PCommunicator.or_fallback(world)
        assert group is world
        return group.why()

    assert "GPU peer-to-peer is not available" in run_threads(2, body)[0]


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
