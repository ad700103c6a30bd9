"""The benchmark's peer of the state-space scan computes the same as the operator."""

import math

import pytest
import samples_mamba
import torch

from shardwise.ops.bench import ssd
from shardwise.ops.registry import TRITON

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.mark.skipif(not TRITON.state[0], reason="needs triton")
def test_the_separate_kernels_compute_the_scan():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    inputs = samples_mamba.ssm_inputs(256, 4, 2, 64, 64, torch.float16, device)
    expected = torch.ops.auto_deploy.torch_ssm(*inputs, [0.0, math.inf], 64)
    state = torch.zeros(4, 64, 64, device=device)
    result = ssd.separate_scan(inputs, state, chunk=128)
    assert (result.float() - expected).norm() < 3e-3 * expected.norm()
