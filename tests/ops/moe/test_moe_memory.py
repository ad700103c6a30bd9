"""MoE and FP8 kernels touch no memory outside their tensors, at sizes that no tile divides."""

import pytest
import torch
from memory_check import checked_memory
from oracles_moe import ALPHA, LIMIT, gpt_oss_layer, nvfp4_stack, routing, stacked

from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.grouped_plan import FewPlan, FewShape, GroupedPlan, Shape
from shardwise.ops.moe.mxfp4 import mxfp4_moe
from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.ops.moe.tiles import Plan, Stream, Tiles
from shardwise.ops.triton_support import interpreting

OPS = torch.ops.auto_deploy
pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="the checker works in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
PLANS = [
    Plan(16, Tiles(64, 64, 4, 2, 2), Tiles(64, 128, 4, 2, 2, 2)),
    Plan(32, Tiles(128, 128, 4, 2, 1), Tiles(128, 64, 4, 2, 1, 3)),
]


@pytest.mark.parametrize("plan", PLANS, ids=["narrow", "wide"])
@pytest.mark.parametrize("tokens", [1, 18, 60])
def test_mxfp4(plan, tokens, monkeypatch):
    layer = gpt_oss_layer(3, 160, 96)  # 192 and 160 rows, 5 and 3 blocks of 32 columns
    up = pack_mxfp4(layer.gate_up, layer.gate_up_scales, layer.gate_up_bias, paired=True)
    down = pack_mxfp4(layer.down, layer.down_scales, layer.down_bias, paired=False)
    with checked_memory(monkeypatch) as seen:
        got = mxfp4_moe(torch.randn(tokens, 160), layer.router, layer.router_bias, 2, up, down, ALPHA, LIMIT, 0, plan)
    assert sum(seen) > 10000 and got.isfinite().all()


@pytest.mark.parametrize("shape", [Tiles(16, 64, 1, 2, 2), Stream(1, 1, 2, 2, 3, 2)], ids=["few", "stream"])
def test_mxfp4_for_one_token(shape, monkeypatch):
    layer = gpt_oss_layer(2, 96, 32)  # 64 and 96 rows, 3 and 1 blocks of 32 columns
    up = pack_mxfp4(layer.gate_up, layer.gate_up_scales, layer.gate_up_bias, paired=True)
    down = pack_mxfp4(layer.down, layer.down_scales, layer.down_bias, paired=False)
    with checked_memory(monkeypatch) as seen:
        got = mxfp4_moe(
            torch.randn(1, 96), layer.router, layer.router_bias, 2, up, down, ALPHA, LIMIT, 0, Plan(8, shape, shape)
        )
    assert sum(seen) > 10000 and got.isfinite().all()


GROUPED = [
    GroupedPlan(16, Shape(32, 64, 4, 2, 1), Shape(64, 32, 4, 2, 1, 2)),
    GroupedPlan(32, Shape(128, 32, 4, 2, 1, 1, 2, True), Shape(64, 64, 4, 2, 1, 1, 2, True)),
    FewPlan(FewShape(32, 512, 4, 2), FewShape(16, 512, 4, 2)),
]


@pytest.mark.parametrize("plan", GROUPED, ids=["narrow", "tokens left", "few"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens,hidden,size", [(1, 80, 48), (9, 77, 45)])
def test_grouped(plan, gated, tokens, hidden, size, monkeypatch):
    ids, weights = routing(tokens, 2, 3)
    ids[0, 0] = 0
    with checked_memory(monkeypatch) as seen:
        grouped_moe(
            torch.randn(tokens, hidden), ids, weights, *stacked(3, hidden, size, gated), "silu" if gated else "relu2",
            plan=plan,
        )  # fmt: skip
    assert sum(seen) > 1000


def test_nvfp4(monkeypatch):
    ids, weights = routing(5, 2, 3)
    (c1, s1, g1, _), (c2, s2, g2, _) = (nvfp4_stack(weight) for weight in stacked(3, 80, 48, True))
    one = torch.ones(())
    with checked_memory(monkeypatch) as seen:
        OPS.trtllm_quant_nvfp4_moe_fused(torch.randn(5, 80), ids, weights, c1, c2, s1, s2, one, one, 1 / g1, 1 / g2)
    assert sum(seen) > 1000


@pytest.mark.parametrize("rows,columns,outputs", [(1, 80, 40), (17, 300, 33)])
def test_fp8_linear(rows, columns, outputs, monkeypatch):
    weight, bias = torch.randn(outputs, columns).to(torch.float8_e4m3fn), torch.randn(outputs)
    with checked_memory(monkeypatch) as seen:
        OPS.trtllm_quant_fp8_linear(torch.randn(rows, columns), weight, bias, torch.ones(()), torch.ones(()))
    assert sum(seen) > 1000
