"""Products with weights that stay float8, against float64."""

import pytest
import torch

from shardwise.ops.linear.float8 import FewTile, Tile, few_float8, skinny_float8
from shardwise.ops.quantization.float8 import Float8Weight
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)


def randn(*shape, dtype=torch.float16, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def float8(rows, columns, tiled):
    """A weight that has every finite code, subnormal ones too, and its values in float64."""
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    codes[codes & 127 == 127] = 3
    codes = codes.view(torch.float8_e4m3fn)
    shape = (-(-rows // 128), -(-columns // 128)) if tiled else (rows,)
    scales = (0.5 + torch.rand(shape)) * columns**-0.5 / 100
    spread = scales[:, None]
    if tiled:
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return Float8Weight(codes.to(DEVICE), scales.to(DEVICE)), (codes.double() * spread.double()).to(DEVICE)


def close(actual, expected, tolerance=2e-3):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def formula(x, values, form, others):
    out = x.double() @ values.T
    if form == "gated":
        half = out.shape[1] // 2
        out = torch.nn.functional.silu(out[:, :half]) * out[:, half:]
    return out + sum(other.double() for other in others)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
@pytest.mark.parametrize("form", ["plain", "bias", "residual", "gated"])
@pytest.mark.parametrize(
    "tokens, columns, tile",
    [(1, 656, Tile(8, 1)), (3, 656, Tile(64, 1, whole=True)), (1, 1024, Tile(64, 1, stages=3))],
    ids=str,
)
def test_a_token_or_a_few_by_multiply_adds(tokens, columns, tile, form, tiled):
    torch.manual_seed(0)
    norm = form in ("bias", "gated")
    rows = 256 if form == "gated" else 200
    weight, values = float8(rows, columns, tiled)
    x, outputs = randn(tokens, columns), rows // 2 if form == "gated" else rows
    norm_weight = randn(columns) if norm else None
    bias = randn(outputs) if form == "bias" else None
    residual = randn(tokens, outputs) if form == "residual" else None
    got = skinny_float8(
        x, weight, norm_weight=norm_weight, eps=1e-5, bias=bias, residual=residual, gated=form == "gated", tile=tile
    )
    wide = x.double()
    if norm:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm_weight.double()
    close(got, formula(wide, values, form, [t for t in (bias, residual) if t is not None]))


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
@pytest.mark.parametrize("form", ["plain", "bias", "residual", "gated"])
@pytest.mark.parametrize("tokens, columns, splits", [(1, 144, 1), (5, 656, 2), (33, 512, 4)])
def test_more_tokens_on_the_matrix_unit(tokens, columns, splits, form, tiled):
    torch.manual_seed(1)
    rows = 256 if form == "gated" else 200
    weight, values = float8(rows, columns, tiled)
    x, bias = randn(tokens, columns), randn(rows) if form == "bias" else None
    residual = randn(tokens, rows) if form == "residual" else None
    for _ in range(2):  # a product in parts leaves its counters as it found them
        got = few_float8(
            x, weight, bias=bias, residual=residual, gated=form == "gated", tile=FewTile(64, 128, 4, 3, splits)
        )
        close(got, formula(x, values, form, [t for t in (bias, residual) if t is not None]))


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
def test_widened_weights_are_codes_times_scales(tiled):
    weight, values = float8(200, 144, tiled)
    wide = weight.widened(torch.empty(200, 144, dtype=torch.float32, device=DEVICE))
    assert torch.equal(wide, values.float())


def test_what_the_kernels_do_not_take_is_said():
    weight, _ = float8(128, 144, True)
    with pytest.raises(ValueError, match="65 tokens; legal: 1 to 64"):
        few_float8(randn(65, 144), weight)
    with pytest.raises(ValueError, match="5 tokens; legal: 1 to 4"):
        skinny_float8(randn(5, 144), weight)
    with pytest.raises(ValueError, match="128 rows of gates and ups; whole tiles of 128 each"):
        few_float8(randn(2, 144), weight, gated=True)
    with pytest.raises(ValueError, match=r"need a multiple of 16 columns and scales of shape \(2, 1\) or \(130,\)"):
        Float8Weight(torch.zeros(130, 40, dtype=torch.float8_e4m3fn), torch.zeros(2, 1))
