"""The grouped kernels with given routing, against float64: pair selection, tilings, weights on the input."""

import json
import threading
from functools import partial

import pytest
import torch
from oracles_moe import e4m3_step, fp8_block_stack, fp8_stack, nvfp4_stack, relative, routed_oracle, routing, stacked

from shardwise.comm.rank import current_groups
from shardwise.ops.kernel_launch import Launcher
from shardwise.ops.moe import cutlass, triton, trtllm
from shardwise.ops.moe.contract import FP8Scales
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.grouped_plan import FewPlan, FewShape, GroupedPlan, Shape, choose_few, choose_plan
from shardwise.ops.moe.nvfp4 import nvfp4_moe
from shardwise.ops.triton_support import interpreting
from shardwise.partition import extent
from shardwise.sharding.layout import ParallelLayout
from shardwise.testing import run_threads

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


@pytest.mark.parametrize("tokens", [1, 8])
def test_weights_may_begin_at_any_element(tokens):
    def moved(weight):
        return torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(weight.shape)

    x, ids, weights, *stacks = tensors(tokens, 2, 3, 48, 32, True)
    ids[0, 0] = 0
    got = OPS.triton_moe_fused(x, ids, weights, *map(moved, stacks), True, 4)
    assert relative(got, routed_oracle(x, ids, weights, *stacks)) < EXACT


@pytest.mark.parametrize("tokens", [1, 8])
def test_scales_of_experts_may_lie_apart(tokens):
    def apart(scale):
        return torch.stack((scale, torch.full_like(scale, float("nan"))), 1)[:, 0]

    x, ids, weights, first, second = tensors(tokens, 2, 3, 48, 32, True)
    ids[0, 0] = 2
    (q1, s1, _), (q2, s2, _) = fp8_stack(first), fp8_stack(second)
    s_in, one = torch.tensor(4 / 448, device=DEVICE), torch.ones((), device=DEVICE)
    close = OPS.trtllm_quant_fp8_moe_fused(x, ids, weights, q1, q2, s_in, s1, one, s2)
    assert close.isfinite().all()
    assert torch.equal(OPS.trtllm_quant_fp8_moe_fused(x, ids, weights, q1, q2, s_in, apart(s1), one, apart(s2)), close)
    none = torch.empty(0, device=DEVICE)
    stacks = q1, q2, none, s_in, one, none
    close = OPS.triton_quant_fp8_moe(x, ids, weights, *stacks, s1, s2, none, True)
    assert torch.equal(OPS.triton_quant_fp8_moe(x, ids, weights, *stacks, apart(s1), apart(s2), none, True), close)


def test_repeated_ids_foreign_ids_and_tokens_without_experts():
    x, ids, weights, *stacks = tensors(5, 2, 3, 32, 16, True)
    ids[:] = torch.tensor([[1, 1], [-1, 2], [3, 0], [-7, 3], [2, 2]], device=DEVICE)
    got = OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)
    assert relative(got, routed_oracle(x, ids, weights, *stacks)) < EXACT
    assert got[3].eq(0).all()
    assert torch.equal(got, OPS.triton_moe_fused(x, ids.int(), weights, *stacks, True, 4))
    weights[(ids < 0) | (ids >= 3)] = float("nan")
    assert torch.equal(got, OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)), "a skipped pair's weight counts"


def test_equal_ids_are_merged_and_the_weight_of_another_pair_is_left_out():
    ids, weights = torch.tensor([[1, 1, -1], [0, 2, 0]]), torch.tensor([[0.5, 0.25, float("nan")], [1.0, 2.0, 3.0]])
    merged, sums = cutlass._merged(ids, weights, 3)
    assert merged.tolist() == [[1, 3, -1], [0, 2, 3]]
    assert sums[0, 0] == 0.75 and sums[1].tolist() == [4.0, 2.0, 4.0]


@pytest.mark.parametrize("skew", [True, False])
def test_all_tokens_to_one_expert_and_none(skew):
    x, ids, weights, *stacks = tensors(33, 1, 3, 32, 16, True)
    ids.fill_(2 if skew else 5)
    got = OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)
    if skew:
        assert relative(got, routed_oracle(x, ids, weights, *stacks)) < EXACT
    else:
        assert got.eq(0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_expert_parallel_sums_to_the_whole(ranks):
    """Seven experts: uneven shares, and an empty one of eight."""
    x, ids, weights, *stacks = tensors(6, 3, 7, 32, 48, True)
    ids[0, 0], ids[1] = 0, -1  # a token with no expert at all
    ids[2] = 6  # one rank's only
    total = 0
    for rank in range(ranks):
        start, stop = extent(7, ranks, rank)
        part = OPS.triton_moe_fused(x, ids - start, weights, *(w[start:stop] for w in stacks), True, 4)
        assert part[1].eq(0).all() and (start <= 6 < stop or part[2].eq(0).all())
        total = total + part.double()
    assert relative(total, routed_oracle(x, ids, weights, *stacks)) < EXACT


@pytest.mark.skipif(DEVICE != "cpu", reason="threads as ranks share the interpreter")
@pytest.mark.parametrize("name", ["triton_moe_fused", "trtllm_moe_fused"])
def test_tokens_travel_to_the_kernels_of_their_experts(name, monkeypatch):
    lock = threading.Lock()  # the interpreter runs one kernel at a time

    def one_at_a_time(*args, **options):
        with lock:
            return grouped_moe(*args, **options)

    for module in (triton, trtllm):
        monkeypatch.setattr(module, "grouped_moe", one_at_a_time)
    calls = [tensors(count, 2, 5, 32, 16, True)[:3] for count in (3, 1)]
    stacks = stacked(5, 32, 16, True)
    mapping = json.dumps({"enable_attention_dp": True, "moe_ep_size": 2, "num_experts": 5})

    def rank_body():
        rank = current_groups().moe_ep.rank
        part = slice(*extent(5, 2, rank))
        got = getattr(OPS, name)(*calls[rank], *(w[part] for w in stacks), True, 4, mapping, 4)
        return (got.double() - routed_oracle(*calls[rank], *stacks)).abs().max().item()

    layout = ParallelLayout(tp=1, attn_dp=2, moe_tp=1, moe_ep=2)
    assert max(run_threads(2, rank_body, layout=layout)) < 1e-5


def test_no_tokens():
    x, ids, weights, *stacks = tensors(0, 2, 3, 32, 16, True)
    assert OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4).shape == (0, 32)


FEW = FewPlan(FewShape(64, 512, 4, 2), FewShape(32, 256, 4, 3))
PLANS = {
    "few": FEW,
    "narrow": GroupedPlan(16, Shape(64, 32, 4, 2, 1), Shape(64, 32, 4, 2, 1, 2)),
    "three splits": GroupedPlan(32, Shape(32, 64, 4, 2, 1), Shape(32, 64, 4, 2, 1, 3, group=3)),
    "wide": GroupedPlan(64, Shape(128, 32, 4, 2, 1, group=2), Shape(128, 32, 4, 2, 1, group=4)),
    "tokens left": GroupedPlan(16, Shape(64, 32, 4, 2, 1, 1, 2, True), Shape(64, 64, 4, 2, 1, 1, 3, True)),
    "tokens in order": GroupedPlan(16, Shape(64, 32, 4, 2, 1, 1, 2, True), Shape(64, 64, 4, 2, 1, 1, 3, True), True),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@plans
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hidden,size", [(96, 80), (76, 52), (41, 27)])  # rows of whole tiles, of 16 bytes, of neither
def test_every_tiling_gives_the_same(plan, gated, hidden, size):
    x, ids, weights, *stacks = tensors(21 if plan is not FEW else 6, 2, 3, hidden, size, gated)
    ids[0, 0] = 0
    got = grouped_moe(x, ids, weights, *stacks, "silu" if gated else "relu2", plan=plan)
    assert relative(got, routed_oracle(x, ids, weights, *stacks, gated)) < EXACT


def packed(x, ids, weights, first, second):
    stacks = [(*nvfp4_stack(stack)[:2], torch.ones(len(stack), device=DEVICE)) for stack in (first, second)]
    return nvfp4_moe("test", x, ids, weights, *stacks, "relu2", False)


@pytest.mark.parametrize("call", [partial(grouped_moe, act="relu2", plan=PLANS["narrow"]), packed])
def test_a_single_token_is_launched_alike_whatever_its_stride(monkeypatch, call):
    """Compiled kernels are found by keys that do not tell such strides apart, and serve more tokens too."""
    launched, launch = [], Launcher.__call__

    def noted(self, device, key, grid, args, **options):
        launched.append((key, [arg for arg in args if isinstance(arg, int)]))
        launch(self, device, key, grid, args, **options)

    monkeypatch.setattr(Launcher, "__call__", noted)
    row, *others = tensors(1, 2, 3, 64, 64, False)
    column = row.view(-1, 1).t()
    assert column.stride() == (1, 1) and torch.equal(call(row, *others), call(column, *others))
    half = len(launched) // 2
    assert launched[:half] == launched[half:]


@plans
def test_weights_on_the_input_of_every_tiling(plan):
    x, ids, weights, *stacks = tensors(5, 3, 4, 32, 48, True)
    ids[0, 0] = 0
    got = grouped_moe(x, ids, weights, *stacks, "silu", True, plan=plan)
    assert relative(got, routed_oracle(x, ids, weights, *stacks, True, True)) < EXACT


def fp8_parts(gated, hidden, size):
    x, ids, weights, first, second = tensors(5, 2, 3, hidden, size, gated)
    ids[0, 0] = 0
    one, other = torch.full((1,), 4 / 448, device=DEVICE), torch.full((1,), 8 / 448, device=DEVICE)
    return x, ids, weights, first, second, one, other


@plans
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("on_input", [True, False])
def test_fp8_rounds_where_the_contract_says(plan, gated, on_input):
    x, ids, weights, first, second, s1, s2 = fp8_parts(gated, 80, 48)
    (q1, w1, v1), (q2, w2, v2) = fp8_stack(first), fp8_stack(second)
    step = e4m3_step(s1)  # a weighted input is rounded to x's dtype first
    wanted = routed_oracle(
        *(x, ids, weights, v1, v2, gated, on_input),
        first_step=lambda row: step(row.to(DTYPE)),
        second_step=e4m3_step(s2),
    )
    for scales in (FP8Scales(s1, w1, s2, w2, True), FP8Scales(s1, w1 * s1, 1 / s2, w2 * s2, False)):
        got = grouped_moe(x, ids, weights, q1, q2, "silu" if gated else "relu2", on_input, scales, plan)
        assert relative(got, wanted) < 1e-2


def fp8_block_parts(gated):
    """(x, ids, weights), (codes, scales) of both products, scales of the inputs, the result in float64."""
    x, ids, weights, first, second, s1, s2 = fp8_parts(gated, 192, 160)
    (q1, w1, v1), (q2, w2, v2) = fp8_block_stack(first, 2 if gated else 1), fp8_block_stack(second, 1)
    wanted = routed_oracle(x, ids, weights, v1, v2, gated, False, e4m3_step(s1), e4m3_step(s2))
    return (x, ids, weights), (q1, w1), (q2, w2), s1, s2, wanted


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("plan", [p for p in PLANS.values() if p is not FEW], ids=[n for n in PLANS if n != "few"])
def test_fp8_weights_may_have_scales_of_blocks(gated, plan):
    call, (q1, w1), (q2, w2), s1, s2, wanted = fp8_block_parts(gated)
    scales, act = FP8Scales(s1, w1, s2, w2, True), "silu" if gated else "relu2"
    assert relative(grouped_moe(*call, q1, q2, act, False, scales, plan), wanted) < 1e-2


@pytest.mark.parametrize("gated", [True, False])
def test_the_fp8_operator_takes_scales_of_blocks_and_names_what_they_must_be(gated):
    call, (q1, w1), (q2, w2), s1, s2, wanted = fp8_block_parts(gated)
    none, act = torch.empty(0, device=DEVICE), 4 if gated else 8
    got = OPS.triton_quant_fp8_moe(*call, q1, q2, none, s1, s2, none, w1, w2, none, gated, act)
    assert relative(got, wanted) < 1e-2
    with pytest.raises(ValueError, match=r"or, for blocks of 128 x 128, \[3, 2, 2\], got \(3, 1, 2\)"):
        OPS.triton_quant_fp8_moe(*call, q1, q2, none, s1, s2, none, w1, w2[:, :1], none, gated, 4)


@pytest.mark.parametrize("pairs,experts", [(8, 128), (2048, 128), (8192, 128), (65536, 8)])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_plans_fit_one_multiprocessor(pairs, experts, itemsize):
    plan = choose_plan(pairs, experts, itemsize)
    for shape, matrices in ((plan.up, 2), (plan.down, 1)):
        stage = (matrices * shape.bn + plan.bt) * shape.bk * itemsize
        assert shape.bk * itemsize in (128, 256) and shape.per_sm * shape.stages * stage <= 227 * 1024


@pytest.mark.parametrize("pairs", [8, 2048, 8192, 65536])
def test_no_tile_reaches_over_a_block_of_scales(pairs):
    plan = choose_plan(pairs, 128, 1, blocks=True)
    for shape in (plan.up, plan.down):
        assert 128 % shape.bn == 0 and 128 % shape.bk == 0


def test_one_token_takes_two_launches_and_many_do_not():
    assert all(choose_few(*call, itemsize, 4096) for call in ((8, 128, 8), (2, 8, 2)) for itemsize in (1, 2))
    assert choose_few(64, 128, 8, 2, 4096) and choose_few(4, 8, 2, 2, 8192) and choose_few(64, 128, 8, 1, 2048)
    assert not any(choose_few(*call, 4096) for call in ((8, 8, 2, 2), (128, 128, 8, 2), (16, 128, 8, 1)))


def test_scales_of_another_number_of_experts_are_named():
    x, ids, weights, *stacks = tensors(3, 2, 3, 32, 16, False)
    first, second = (w.to(torch.float8_e4m3fn) for w in stacks)
    one, three = torch.ones(1, device=DEVICE), torch.ones(3, device=DEVICE)
    args = [x, ids, weights, first, second, one, one, one, one, three, three, one]
    with pytest.raises(ValueError, match=r"must be \[E\] = \[3\] or, for blocks of 128 x 128, \[3, 1, 1\], got \(2,\)"):
        OPS.triton_quant_fp8_moe(*args[:10], three[:2], one)
    with pytest.raises(TypeError, match="must be float8_e4m3fn"):
        OPS.triton_quant_fp8_moe(*args[:3], *stacks, *args[5:])
