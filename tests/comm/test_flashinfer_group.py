"""Transport `flashinfer` with a double of its library: all ranks take its kernels, or none, wherever tensors begin."""

from types import SimpleNamespace

import pytest
import torch

from shardwise.comm import compose
from shardwise.comm.p2p.flashinfer import FlashInferCommunicator

TOKENS, HIDDEN, EPS = 3, 1024, 1e-5
PLAIN, FUSED = "all-reduce", "with residual and norm"


class Kernels:
    """TRT-LLM's all-reduce for two ranks that hold the same values."""

    AllReduceFusionPattern = SimpleNamespace(kAllReduce=PLAIN, kARResidualRMSNorm=FUSED)

    def __init__(self):
        self.calls = 0

    def trtllm_allreduce_fusion(
        self, *, allreduce_in, allreduce_out, residual_in, residual_out, norm_out, rms_gamma, rms_eps, pattern_code, **_
    ):
        self.calls += 1
        given = allreduce_in, allreduce_out, residual_in, residual_out, norm_out, rms_gamma
        assert all(each.data_ptr() % 16 == 0 for each in given if each is not None), "its accesses are of 16 bytes"
        if pattern_code == PLAIN:
            allreduce_out.copy_(2 * allreduce_in)
        else:
            found = compose.residual_rms_norm(2 * allreduce_in, residual_in.clone(), rms_gamma, rms_eps, 0.0)
            norm_out.copy_(found[0])
            residual_out.copy_(found[1])


@pytest.fixture
def group():
    made = object.__new__(FlashInferCommunicator)
    made.rank, made.size, made.max_elements = 0, 2, TOKENS * HIDDEN
    made._workspace, made._library = None, Kernels()
    return made


def placed(values, offset):
    """A copy whose memory begins so many elements after a multiple of 16 bytes."""
    memory = values.new_empty(offset + values.numel())
    return memory[offset:].view(values.shape).copy_(values)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_sum_is_the_kernels_wherever_tensors_begin(group, offset):
    values = torch.randn(TOKENS * HIDDEN).bfloat16()
    source, target = placed(values, offset), placed(torch.zeros_like(values), offset)
    group._reduce(source, target, "AUTO")
    assert group._library.calls == 1 and torch.equal(target, 2 * values)


@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_a_fused_sum_is_the_kernels_wherever_tensors_begin(group, offsets):
    x, residual = torch.randn(2, TOKENS, HIDDEN).bfloat16()
    weight = torch.rand(HIDDEN).bfloat16()
    normed, total = compose.residual_rms_norm(2 * x, residual.clone(), weight, EPS, 0.0)
    x, residual, weight = (placed(each, offset) for each, offset in zip((x, residual, weight), offsets, strict=True))
    out = torch.empty_like(x)
    kernel = group._fused(x, residual, weight, 0.0, "AUTO", out, residual)
    kernel(x, residual, weight, EPS, 0.0, out, residual)
    assert group._library.calls == 1 and torch.equal(out, normed) and torch.equal(residual, total)
