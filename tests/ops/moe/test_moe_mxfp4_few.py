"""The MXFP4 GEMMs for blocks of 8 or 16 tokens: more and fewer tiles of K than are in flight, splits, partial tiles."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles_moe import ALPHA, LIMIT, relative

from shardwise.ops.moe import mxfp4
from shardwise.ops.moe.mxfp4 import Product, run_gemm
from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.ops.moe.routing import routed, turn_rows
from shardwise.ops.moe.tiles import Plan, Stream, Tiles
from shardwise.ops.quantization.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from shardwise.ops.triton_support import interpreting
from shardwise.ops.workspace import Workspace

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


def rows_of(x, columns):
    """Rows of whole tiles, turned: of 32 columns, lane, then k-step and k-half of the matrix unit's fragment."""
    halves = F.pad(x, (0, columns - x.shape[1])).view(x.shape[0], -1, 4, 4, 2)
    return halves.transpose(2, 3).reshape(x.shape[0], columns)


FIRST = [
    (448, 8, Tiles(16, 64, 1, 3, 4)),
    (320, 16, Tiles(16, 64, 4, 5, 4)),
    (160, 8, Tiles(16, 64, 2, 2, 4)),
    (448, 8, Stream(1, 1, 1, 2, 3, 4)),
    (320, 16, Stream(4, 4, 1, 3, 2, 4)),
    (160, 8, Stream(2, 2, 2, 1, 2, 4)),
    (832, 8, Stream(1, 1, 4, 2, 2, 4)),
]


@pytest.mark.parametrize("columns,block,shape", FIRST, ids=str)
def test_the_first_product_with_its_activation(columns, block, shape):
    packed, values, bias, ids, routing = given(24, columns, True, block)
    x, out = torch.randn(3, columns, device=DEVICE).to(DTYPE), torch.full((3, 64), torch.nan, device=DEVICE)
    rows = rows_of(x, packed.words.shape[2] * 64)
    run_gemm(Plan(block, shape, shape), shape, Product(rows, packed, out, routing, "swiglu", ALPHA, LIMIT))
    z = torch.einsum("th,tnh->tn", x.double(), values[ids]) + bias[ids]
    gate, up = z[:, 0::2].clamp(max=LIMIT), z[:, 1::2].clamp(-LIMIT, LIMIT)
    wanted = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
    assert relative(out, rows_of(wanted[routing.order.long()], 64)) < EXACT  # zeros behind the twelfth column


SECOND = [
    (448, Tiles(16, 64, 1, 5, 4, 2)),
    (320, Tiles(16, 64, 4, 2, 4)),
    (448, Stream(1, 1, 1, 5, 2, 4, 2)),
    (320, Stream(4, 2, 2, 2, 3, 4)),
]


@pytest.mark.parametrize("columns,shape", SECOND, ids=str)
def test_the_second_product_in_parts(columns, shape):
    packed, values, bias, ids, routing = given(40, columns, False, 8)
    inner = torch.randn(3, columns, device=DEVICE).to(DTYPE)  # in sorted positions
    out = torch.full((shape.splits, 3, 40), torch.nan, device=DEVICE)
    run_gemm(Plan(8, shape, shape), shape, Product(rows_of(inner, columns), packed, out, routing, "none"))
    pairs = routing.order.long()
    wanted = torch.einsum("ph,pnh->pn", inner.double(), values[ids[pairs]]) + bias[ids[pairs]]
    assert relative(out.sum(0)[pairs], wanted) < EXACT


@pytest.mark.parametrize("shape", [Tiles(16, 64, 1, 2, 3), Tiles(16, 64, 2, 3, 5), Tiles(16, 64, 1, 2, 7, 2)], ids=str)
def test_programs_that_share_rows_add_their_parts_of_k(shape, monkeypatch):
    monkeypatch.setattr(mxfp4, "multiprocessors", lambda device: 1)  # so few programs that shares end inside of rows
    packed, values, bias, ids, routing = given(120, 448, False, 8)
    inner = torch.randn(3, 448, device=DEVICE).to(DTYPE)
    product = Product(rows_of(inner, 448), packed, torch.empty(0), routing, "none")
    calls = 3 if DEVICE == "cuda" else 2  # the interpreter has no races; a second call finds the counters at zero again
    results = [torch.full((shape.splits, 3, 120), torch.nan, device=DEVICE) for _ in range(calls)]
    for out in results:
        run_gemm(Plan(8, shape, shape), shape, replace(product, out=out))
    pairs = routing.order.long()
    wanted = torch.einsum("ph,pnh->pn", inner.double(), values[ids[pairs]]) + bias[ids[pairs]]
    assert relative(results[0].sum(0)[pairs], wanted) < EXACT
    assert all(torch.equal(out, results[0]) for out in results)


def test_tokens_are_turned_with_zeros_behind_the_last_column():
    x = torch.randn(3, 160, device=DEVICE).to(DTYPE)
    got = turn_rows(Workspace((torch.device(DEVICE), "test")), x, 192)
    assert torch.equal(got, rows_of(x, 192))


def test_a_plan_that_these_kernels_cannot_run_is_a_named_error():
    packed, _, _, _, routing = given(24, 64, True, 8)
    shape = Tiles(16, 64, 1, 2, 4)
    product = Product(torch.zeros(3, 64, device=DEVICE).to(DTYPE), packed, torch.zeros(3, 64), routing, "swiglu")
    with pytest.raises(ValueError, match="blocks of 32, narrow scales, swiglu; legal: blocks of 8 or 16"):
        run_gemm(Plan(32, shape, shape), shape, product)
