"""Experts whose weights stay float8, activations not quantised, against float64."""

import pytest
import torch
from oracles_moe import float8_stack, relative, routed_oracle, routing

from shardwise.ops.moe.contract import WeightScales
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.grouped_plan import FewPlan, FewShape, choose_few, choose_mixed_plan
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
EXACT = 1e-5 if DEVICE == "cpu" else 8e-3
pytestmark = [
    pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


def check(tokens, plan, tiled, on_input=False):
    torch.manual_seed(4)
    experts, hidden, size, top_k = 3, 144, 128, 2
    first, first_scales, up = float8_stack(experts, 2 * size, hidden, tiled, DEVICE)
    second, second_scales, down = float8_stack(experts, hidden, size, tiled, DEVICE)
    x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE)
    ids, weights = routing(tokens, top_k, experts, DEVICE)
    scales = WeightScales(first_scales, second_scales)
    got = grouped_moe(x, ids, weights, first, second, "silu", on_input, scales, plan)
    assert relative(got, routed_oracle(x, ids, weights, up, down, True, on_input)) < EXACT


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
@pytest.mark.parametrize("tokens, each", [(2, 1), (3, 16), (3, 32)])
def test_grouped_products(tokens, each, tiled):
    check(tokens, choose_mixed_plan(each, 1), tiled)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
def test_matrix_vector_products(tiled):
    check(2, FewPlan(FewShape(32, 64, 4, 3), FewShape(16, 64, 4, 3)), tiled)


def test_plans_are_chosen_and_weights_may_go_to_the_input():
    check(1, None, True, on_input=True)
    check(5, None, True, on_input=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="codes are turned to numbers by warps of Hopper alone")
@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
@pytest.mark.parametrize("experts, hidden, size, tokens", [(3, 144, 128, 400), (8, 1024, 384, 700), (2, 512, 640, 90)])
def test_many_pairs(experts, hidden, size, tokens, tiled):
    torch.manual_seed(4)
    first, first_scales, up = float8_stack(experts, 2 * size, hidden, tiled, DEVICE)
    second, second_scales, down = float8_stack(experts, hidden, size, tiled, DEVICE)
    x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE)
    ids, weights = routing(tokens, 2, experts, DEVICE)
    scales = WeightScales(first_scales, second_scales)
    plan = choose_mixed_plan(1000, 1, True)
    assert plan.up.specialised
    got = grouped_moe(x, ids, weights, first, second, "silu", scales=scales, plan=plan)
    assert relative(got, routed_oracle(x, ids, weights, up, down, True, False)) < EXACT
    for _ in range(10):
        assert torch.equal(got, grouped_moe(x, ids, weights, first, second, "silu", scales=scales, plan=plan))


def test_codes_are_turned_for_whole_blocks_where_a_device_can():
    assert choose_mixed_plan(1024, 4, True).up.specialised and choose_mixed_plan(1024, 4, True).copied
    for plan in (choose_mixed_plan(1020, 4, True), choose_mixed_plan(1024, 4, False)):
        assert plan.bt == 64 and not plan.up.specialised


def test_few_pairs_take_matrix_vector_products_however_long_the_rows():
    assert choose_few(64, 256, 8, 1, 7168, alone=True) and not choose_few(64, 256, 8, 1, 7168)
    assert choose_few(136, 256, 8, 1, 7168, alone=True) is None
