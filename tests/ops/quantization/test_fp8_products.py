"""The FP8 product of GPUs, run by PyTorch's CPU version of the same call."""

import pytest
import torch
from oracles_moe import relative

import shardwise.ops  # noqa: F401 - registers the operators
from shardwise.ops.quantization import fp8, reference
from shardwise.ops.triton_support import interpreting


@pytest.fixture
def places(monkeypatch):
    """Where the operands and scales of each product lay, past a multiple of 16 bytes."""
    seen, product = [], torch._scaled_mm

    def noted(codes, weight, scale_a, scale_b, **options):
        seen.extend(tensor.data_ptr() % 16 for tensor in (codes, weight, scale_a, scale_b))
        return product(codes, weight, scale_a, scale_b, **options)

    monkeypatch.setattr(reference, "_native_fp8", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", noted)
    return seen


@pytest.mark.parametrize("rows,outputs,columns", [(1, 16, 32), (3, 10, 24), (17, 40, 77)])
def test_products_of_any_size_take_weights_and_scales_out_of_others(places, rows, outputs, columns):
    x, scales = torch.randn(rows, columns), torch.full((4,), 5 / 448)
    codes, w_scale = fp8.quantize_fp8(torch.randn(1 + outputs * columns))
    codes = codes[1:].view(outputs, columns)
    scales[1] = w_scale
    got = torch.ops.auto_deploy.torch_quant_fp8_linear(x, codes, None, scales[3], scales[1])
    rounded = (x / scales[3]).to(torch.float8_e4m3fn).double() * scales[3].double()
    assert relative(got, rounded @ (codes.double() * w_scale.double()).T) < 1e-5
    assert got.is_contiguous() and places == [0, 0, 0, 0]


@pytest.mark.parametrize("batch,rows,outputs,columns", [(3, 5, 16, 32), (2, 17, 40, 77), (2, 0, 16, 32)])
def test_batches_too(places, batch, rows, outputs, columns):
    left, s_left = fp8.quantize_fp8(torch.randn(batch, rows, columns), torch.tensor(5 / 448))
    right, s_right = fp8.quantize_fp8(torch.randn(batch, columns, outputs))
    s_left.requires_grad_()
    got = torch.ops.auto_deploy.torch_quant_fp8_bmm(left, right, s_left, s_right)
    assert got.shape == (batch, rows, outputs) and got.is_contiguous() and got.dtype == torch.bfloat16
    assert places == ([0, 0, 0, 0] * batch if rows else [])
    if rows:
        assert relative(got, left.double() @ right.double() * (s_left.detach() * s_right).double()) < 4e-3


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("outputs", [8, 24])
def test_a_bias_may_lie_apart_from_its_neighbours(outputs):
    x, bias = torch.randn(3, 32), torch.randn(outputs, 2)
    codes, scale = fp8.quantize_fp8(torch.randn(outputs, 32))
    given = x, codes, bias[:, 0], torch.tensor(5 / 448), scale
    want = torch.ops.auto_deploy.torch_quant_fp8_linear(*given)
    torch.testing.assert_close(torch.ops.auto_deploy.trtllm_quant_fp8_linear(*given), want, rtol=1e-5, atol=1e-5)
