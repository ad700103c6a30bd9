"""The grouped kernels with given routing, against float64: pair selection, tilings, weights on the input."""

import pytest
import torch
from oracles_moe import relative, routed_oracle, routing, stacked

from shardwise.ops.moe.grouped import choose_plan, grouped_moe
from shardwise.ops.moe.tiles import Plan, Tiles
from shardwise.ops.triton_support import interpreting

OPS = torch.ops.auto_deploy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
EXACT = 1e-5 if DEVICE == "cpu" else 8e-3
pytestmark = [
    pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


def tensors(tokens, top_k, experts, hidden, size, gated):
    x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE)
    return x, *routing(tokens, top_k, experts, DEVICE), *stacked(experts, hidden, size, gated, DEVICE, DTYPE)


@pytest.mark.parametrize("tokens,top_k,experts", [(1, 1, 1), (4, 3, 5), (40, 2, 3)])
@pytest.mark.parametrize("gated", [True, False])
def test_grouped_kernels_agree_with_float64(tokens, top_k, experts, gated):
    x, ids, weights, *stacks = tensors(tokens, top_k, experts, 48, 80, gated)
    ids[0, 0] = 0
    got = OPS.triton_moe_fused(x, ids, weights, *stacks, gated, 4 if gated else 8)
    assert relative(got, routed_oracle(x, ids, weights, *stacks, gated)) < EXACT


@pytest.mark.parametrize("gated", [True, False])
def test_weights_may_go_to_the_input(gated):
    x, ids, weights, *stacks = tensors(6, 2, 4, 32, 48, gated)
    ids[0, 0] = 0
    got = OPS.triton_moe_fused(x, ids, weights, *stacks, gated, 4 if gated else 8, "", 0, True)
    assert relative(got, routed_oracle(x, ids, weights, *stacks, gated, True)) < EXACT


def test_repeated_ids_foreign_ids_and_tokens_without_experts():
    x, ids, weights, *stacks = tensors(5, 2, 3, 32, 16, True)
    ids[:] = torch.tensor([[1, 1], [-1, 2], [3, 0], [-7, 3], [2, 2]], device=DEVICE)
    got = OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)
    assert relative(got, routed_oracle(x, ids, weights, *stacks)) < EXACT
    assert got[3].eq(0).all()
    assert torch.equal(got, OPS.triton_moe_fused(x, ids.int(), weights, *stacks, True, 4))


@pytest.mark.parametrize("skew", [True, False])
def test_all_tokens_to_one_expert_and_none(skew):
    x, ids, weights, *stacks = tensors(33, 1, 3, 32, 16, True)
    ids.fill_(2 if skew else 5)
    got = OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)
    if skew:
        assert relative(got, routed_oracle(x, ids, weights, *stacks)) < EXACT
    else:
        assert got.eq(0).all()


def test_no_tokens():
    x, ids, weights, *stacks = tensors(0, 2, 3, 32, 16, True)
    assert OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4).shape == (0, 32)


@pytest.mark.parametrize("splits,bt,bn,bk", [(2, 16, 64, 32), (3, 32, 32, 64), (1, 64, 128, 32)])
def test_every_tiling_gives_the_same(splits, bt, bn, bk):
    x, ids, weights, *stacks = tensors(21, 2, 3, 96, 80, True)
    ids[0, 0] = 0
    plan = Plan(bt, Tiles(bn, bk, 4, 2, 1), Tiles(bn, bk, 4, 2, 1, splits))
    got = grouped_moe(x, ids, weights, *stacks, "silu", plan=plan)
    assert relative(got, routed_oracle(x, ids, weights, *stacks)) < EXACT


@pytest.mark.parametrize("pairs,experts", [(8, 128), (512, 128), (8192, 128), (65536, 8)])
def test_plans_fit_one_multiprocessor(pairs, experts):
    plan = choose_plan(pairs, experts)
    for tiles, matrices in ((plan.up, 2), (plan.down, 1)):
        stage = (matrices * tiles.bn + plan.bt) * tiles.bk * 2
        assert tiles.per_sm * tiles.stages * stage <= 227 * 1024


def test_scales_of_another_number_of_experts_are_named():
    x, ids, weights, *stacks = tensors(3, 2, 3, 32, 16, False)
    first, second = (w.to(torch.float8_e4m3fn) for w in stacks)
    one, three = torch.ones(1, device=DEVICE), torch.ones(3, device=DEVICE)
    args = [x, ids, weights, first, second, one, one, one, one, three, three, one]
    with pytest.raises(ValueError, match=r"must be \[E\] = \[3\], got \(2,\)"):
        OPS.triton_quant_fp8_moe(*args[:10], three[:2], one)
    with pytest.raises(TypeError, match="must be float8_e4m3fn"):
        OPS.triton_quant_fp8_moe(*args[:3], *stacks, *args[5:])
