"""Mixtures of experts whose tokens travel between ranks, on one GPU by threads and on two by processes."""

import pytest
import torch
from moe_ranks import layout, travel, travel_as_process

from shardwise.testing import run_processes, run_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMIT = 2e-2
"""Partial sums are rounded to bf16, and an e4m3 code of the activation may differ where sums have another order."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_threads_of_one_gpu_get_what_one_rank_computes(ranks):
    for errors in run_threads(ranks, travel, "cuda", layout=layout(ranks)):
        assert all(error < LIMIT for error in errors.values()), errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("transport", ["nccl", "auto"])
def test_two_gpus_get_what_one_computes_also_in_a_graph(transport):
    target = f"moe_ranks:{travel_as_process.__name__}"
    for errors, captured in run_processes(2, target, transport, timeout=100):
        assert all(error < LIMIT for error in errors.values()), errors
        assert captured < LIMIT
