import pytest
import torch

from shardwise.parallel.layers import JOINED_TOKENS, PANEL, Linear


@pytest.mark.parametrize("tokens", [1, 5, JOINED_TOKENS])
@pytest.mark.parametrize("outputs", [3 * PANEL, PANEL + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_rows_are_those_of_the_weight(dtype, outputs, tokens):
    weight, bias, x = torch.randn(outputs, 48), torch.randn(outputs), torch.randn(tokens, 48)
    weight, bias, x = weight.to(dtype), bias.to(dtype), x.to(dtype)
    linear = Linear(weight=weight, bias=bias)
    expected = x.double() @ weight.double().T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(linear(x).double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(linear.weight, weight.T)
    assert torch.equal(linear.rows(torch.tensor([0, outputs - 1])), weight[[0, outputs - 1]])


def test_16_bit_weights_are_not_copied():
    weight = torch.randn(64, 48).bfloat16()
    assert Linear(weight=weight).panels.data_ptr() == weight.data_ptr()
