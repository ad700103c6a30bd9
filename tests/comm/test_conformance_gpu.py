"""The conformance suite on CUDA tensors of two GPUs: demo mode and MPI mode, all transports of a mode in one job."""

import conformance
import pytest
import torch

from shardwise.testing import run_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

TRANSPORTS = {
    "demo": ("nccl", "p2p", "p2p checked", "p2p deterministic", "auto", "flashinfer"),
    "MPI": ("mpi", "nccl", "p2p", "auto"),
}
CASES = [(mode, transport) for mode, transports in TRANSPORTS.items() for transport in transports]


@pytest.fixture(scope="module")
def results():
    """By mode: what each rank says of each transport. A mode runs when its first case asks."""
    found = {}

    def of(mode):
        if mode not in found:
            try:
                found[mode] = run_processes(
                    2, "rank_bodies:conform_cuda", TRANSPORTS[mode], mpi=mode == "MPI", timeout=100
                )
            except Exception as error:  # the cases that follow need not run it again
                found[mode] = error
        if isinstance(found[mode], Exception):
            raise found[mode]
        return found[mode]

    return of


@pytest.mark.parametrize("mode, transport", CASES)
def test_conformance(results, mode, transport):
    for rank in results(mode):
        passed, why = rank[transport]
        assert why is not None, passed
        assert len(passed) >= len(conformance.CASES)
        assert transport == "auto" or transport.split()[0] in why


@pytest.mark.parametrize("mode", TRANSPORTS)
def test_auto_takes_the_peer_to_peer_kernels(results, mode):
    assert all("p2p (CUDA IPC between 2 GPUs" in rank["auto"][1] for rank in results(mode))
