"""Products with weights that stay 4-bit integers, against float64."""

import pytest
import torch

from shardwise.ops.linear.int4 import Tile, few_int4
from shardwise.ops.linear.int4_many import FEW, ManyTile, int4_product, many_int4, most_tokens
from shardwise.ops.quantization.int4_weight import held_bytes, pack_int4
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)
TYPES = [torch.float16] if interpreting() else [torch.float16, torch.bfloat16]
GROUPINGS = [(32, torch.bfloat16, 160), (64, torch.float16, 192), (128, torch.float16, 640)]
"""Columns that share a scale, its type, columns of a weight."""


def randn(*shape, dtype=torch.float16, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def int4(rows, columns, group, scale_dtype=torch.float16):
    """A weight that has every code and zero point, and its values in float64."""
    groups = columns // group
    codes, zeros = (torch.randint(0, 16, (rows, n), dtype=torch.uint8) for n in (columns, groups))
    scales = ((0.5 + torch.rand(rows, groups)) * columns**-0.5 / 4).to(scale_dtype)
    values = (codes.double().unflatten(1, (groups, group)) - zeros[..., None]) * scales.double()[..., None]
    packed = pack_int4(*(each.to(DEVICE) for each in (codes, scales, zeros)))
    assert packed.nbytes == held_bytes(rows, columns, group)
    return packed, values.flatten(1).to(DEVICE)


def close(actual, expected):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (6e-3 if actual.dtype == torch.bfloat16 else 1e-3), f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("group", "scale_dtype", "columns"), GROUPINGS, ids=["32", "64", "128"])
@pytest.mark.parametrize("form", ["plain", "bias, residual", "gated"])
@pytest.mark.parametrize(
    ("tokens", "tile"), [(1, Tile(2, 2, 2)), (5, Tile(2, 4, 3, False)), (33, Tile(4, 2, 1))], ids=str
)
def test_products_are_those_of_the_values(tokens, tile, form, group, scale_dtype, columns, dtype):
    torch.manual_seed(0)
    gated, rows = form == "gated", 160 if form == "gated" else 200
    weight, values = int4(rows, columns, group, scale_dtype)
    x, norm = randn(tokens, columns, dtype=dtype), randn(columns, dtype=dtype) if tokens == 1 else None
    bias, residual = (randn(rows, dtype=dtype), randn(tokens, rows, dtype=dtype)) if "bias" in form else (None, None)
    got = few_int4(x, weight, norm_weight=norm, eps=1e-5, bias=bias, residual=residual, gated=gated, tile=tile)
    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm.double()
    expected = wide @ values.T
    if gated:
        expected = torch.nn.functional.silu(expected[:, : rows // 2]) * expected[:, rows // 2 :]
    close(got, expected + sum(each.double() for each in (bias, residual) if each is not None))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("group", "scale_dtype", "columns"), GROUPINGS[1:], ids=["64", "128"])
@pytest.mark.parametrize(
    ("tokens", "tile"), [(20, ManyTile(64, 32, 4, 3, 1)), (40, ManyTile(128, 32, 4, 3, 2))], ids=str
)
def test_products_of_many_tokens_are_those_of_the_values(tokens, tile, group, scale_dtype, columns, dtype):
    torch.manual_seed(3)
    weight, values = int4(200, columns, group, scale_dtype)
    x, bias, residual = (randn(*shape, dtype=dtype) for shape in ((tokens, columns), (200,), (tokens, 200)))
    for _ in range(2):  # a product in parts leaves its counters as it found them
        got = many_int4(x, weight, bias=bias, residual=residual, tile=tile)
        close(got, x.double() @ values.T + bias.double() + residual.double())


@pytest.mark.parametrize(("group", "columns"), [(32, 96), (128, 256)])
def test_gated_products_of_any_number_of_tokens(group, columns):
    torch.manual_seed(4)
    weight, values = int4(64, columns, group)
    for tokens in (2, FEW + 1, most_tokens(weight)):
        x, residual = randn(tokens, columns), randn(tokens, 32)
        gate, up = (x.double() @ values.T).chunk(2, 1)
        got = int4_product(x, weight, residual=residual, gated=True)
        close(got, torch.nn.functional.silu(gate) * up + residual.double())


def test_a_row_and_columns_beyond_the_whole_rounds_count():
    torch.manual_seed(1)
    weight, values = int4(17, 1024 + 128, 128)
    x = randn(2, values.shape[1])
    close(few_int4(x, weight), x.double() @ values.T)


def test_what_lies_beside_the_inputs_counts_nothing():
    torch.manual_seed(2)
    weight, values = int4(16, 192, 64)
    memory = torch.full((4, 192), torch.nan, dtype=torch.float16, device=DEVICE)
    memory[1] = randn(192)
    x = memory[1:2]
    close(few_int4(x, weight, tile=Tile(1, 2, 2)), x.double() @ values.T)


@pytest.mark.parametrize(("group", "scale_dtype", "columns"), GROUPINGS, ids=["32", "64", "128"])
def test_widened_weights_are_codes_less_zeros_times_scales(group, scale_dtype, columns):
    weight, values = int4(40, columns, group, scale_dtype)
    wide = weight.widened(torch.empty(40, columns, dtype=torch.float32, device=DEVICE))
    assert torch.equal(wide, values.float())


def test_what_the_kernels_do_not_take_is_said():
    weight, _ = int4(48, 128, 64)
    with pytest.raises(ValueError, match="65 tokens; legal: 1 to 64"):
        few_int4(randn(65, 128), weight)
    with pytest.raises(ValueError, match="2 x 16 n rows, not 48"):
        few_int4(randn(1, 128), weight, gated=True)
    with pytest.raises(ValueError, match="norms are those of one token, got 2"):
        few_int4(randn(2, 128), weight, norm_weight=randn(128))
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    for groups, scale_dtype in ((4, torch.float16), (1, torch.float32)):
        with pytest.raises(ValueError, match="groups of 128, 64, 32 columns and scales of 16 bits are legal"):
            pack_int4(codes, torch.ones(16, groups, dtype=scale_dtype), torch.zeros(16, groups, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"many_int4: x \[T, 96\] and groups of 64 or 128, got \(2, 96\) and groups of 32"
    ):
        many_int4(randn(2, 96), int4(16, 96, 32)[0])
