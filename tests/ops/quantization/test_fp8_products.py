"""The FP8 product of GPUs, run by PyTorch's CPU version of the same call."""

import pytest
import torch
from oracles_moe import relative

import shardwise.ops  # noqa: F401 - registers the operators
from shardwise.ops.quantization import fp8, reference


@pytest.fixture
def scales_seen(monkeypatch):
    """Where the scales of each product lay, past a multiple of 16 bytes."""
    seen, product = [], torch._scaled_mm

    def noted(codes, weight, scale_a, scale_b, **options):
        seen.extend(scale.data_ptr() % 16 for scale in (scale_a, scale_b))
        return product(codes, weight, scale_a, scale_b, **options)

    monkeypatch.setattr(reference, "_native_fp8", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", noted)
    return seen


@pytest.mark.parametrize("rows,outputs,columns", [(1, 16, 32), (3, 10, 24), (17, 40, 77)])
def test_products_of_any_size_take_scales_out_of_a_list_of_views(scales_seen, rows, outputs, columns):
    x, scales = torch.randn(rows, columns), torch.full((4,), 5 / 448)
    codes, w_scale = fp8.quantize_fp8(torch.randn(outputs, columns))
    scales[1] = w_scale
    got = torch.ops.auto_deploy.torch_quant_fp8_linear(x, codes, None, scales[3], scales[1])
    rounded = (x / scales[3]).to(torch.float8_e4m3fn).double() * scales[3].double()
    assert relative(got, rounded @ (codes.double() * w_scale.double()).T) < 1e-5
    assert got.is_contiguous() and scales_seen == [0, 0]


@pytest.mark.parametrize("batch,rows,outputs,columns", [(3, 5, 16, 32), (2, 17, 40, 77), (2, 0, 16, 32)])
def test_batches_too(scales_seen, batch, rows, outputs, columns):
    left, s_left = fp8.quantize_fp8(torch.randn(batch, rows, columns), torch.tensor(5 / 448))
    right, s_right = fp8.quantize_fp8(torch.randn(batch, columns, outputs))
    got = torch.ops.auto_deploy.torch_quant_fp8_bmm(left, right, s_left, s_right)
    assert got.shape == (batch, rows, outputs) and got.is_contiguous() and got.dtype == torch.bfloat16
    assert scales_seen == ([0, 0] * batch if rows else [])
    if rows:
        assert relative(got, left.double() @ right.double() * (s_left * s_right).double()) < 4e-3
