"""The conformance suite on CUDA tensors of two GPUs: demo mode and MPI mode."""

import conformance
import pytest
import torch

from shardwise.testing import run_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("mpi", [False, True], ids=["demo", "mpi"])
@pytest.mark.parametrize("transport", ["nccl", "p2p", "auto"])
def test_conformance(transport, mpi):
    for passed, why in run_processes(2, "rank_bodies:conform_cuda", transport, mpi=mpi, timeout=240):
        assert len(passed) == len(conformance.CASES)
        assert transport == "auto" or transport in why


def test_mpi_stages_cuda_tensors():
    for passed, why in run_processes(2, "rank_bodies:conform_cuda", "mpi", mpi=True, timeout=240):
        assert len(passed) == len(conformance.CASES)
        assert "mpi" in why
