"""The MXFP4 GEMM for blocks of 8 or 16 tokens: K of more tiles than are in flight, splits, unfinished tiles."""

import pytest
import torch
from oracles_moe import ALPHA, LIMIT, relative

from shardwise.ops.moe.mxfp4 import run_gemm
from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.ops.moe.routing import routed
from shardwise.ops.moe.tiles import Plan, Tiles
from shardwise.ops.moe.workspace import Workspace
from shardwise.ops.quantization.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
EXACT = 1e-5 if DEVICE == "cpu" else 5e-3
pytestmark = [
    pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


def given(rows, columns, paired, block):
    """(packed weights, their values in float64, biases, routing of three tokens to experts 1 and 2 of 3)."""
    torch.manual_seed(3)
    blocks, scales = quantize_mxfp4(torch.randn(3, rows, columns, device=DEVICE) * columns**-0.5)
    bias = torch.randn(3, rows, device=DEVICE)
    ids = torch.tensor([[2], [1], [2]], device=DEVICE)
    routing = routed(Workspace((torch.device(DEVICE), "test")), ids, torch.ones(3, 1, device=DEVICE), 3, block)
    values = dequantize_mxfp4(blocks, scales, torch.float64)
    return pack_mxfp4(blocks, scales, bias, paired), values, bias.double(), ids.flatten(), routing


@pytest.mark.parametrize("columns,ask,block", [(448, 4, 8), (320, 0, 16), (160, 64, 8)])
def test_the_first_product_with_its_activation(columns, ask, block):
    packed, values, bias, ids, routing = given(24, columns, True, block)
    x, out = torch.randn(3, columns, device=DEVICE).to(DTYPE), torch.full((3, 12), torch.nan, device=DEVICE)
    tiles = Tiles(16, 64, 1, 5, 4, 1, ask)
    run_gemm(Plan(block, tiles, tiles), tiles, x, packed, out, routing, "swiglu", ALPHA, LIMIT)
    z = torch.einsum("th,tnh->tn", x.double(), values[ids]) + bias[ids]
    gate, up = z[:, 0::2].clamp(max=LIMIT), z[:, 1::2].clamp(-LIMIT, LIMIT)
    wanted = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
    assert relative(out, wanted[routing.order.long()]) < EXACT


@pytest.mark.parametrize("columns,splits", [(448, 2), (320, 1)])
def test_the_second_product_in_parts(columns, splits):
    packed, values, bias, ids, routing = given(40, columns, False, 8)
    inner = torch.randn(3, columns, device=DEVICE).to(DTYPE)  # in sorted positions
    out = torch.full((splits, 3, 40), torch.nan, device=DEVICE)
    tiles = Tiles(16, 64, 1, 5, 4, splits)
    run_gemm(Plan(8, tiles, tiles), tiles, inner, packed, out, routing, "none")
    pairs = routing.order.long()
    wanted = torch.einsum("ph,pnh->pn", inner.double(), values[ids[pairs]]) + bias[ids[pairs]]
    assert relative(out.sum(0)[pairs], wanted) < EXACT
