"""MoE kernels with given routing and FP8 linears on a GPU at real sizes: errors beside other products, graphs."""

from dataclasses import replace

import pytest
import torch
from oracles_moe import (
    e4m3_step,
    fp8_block_stack,
    fp8_stack,
    nvfp4_stack,
    relative,
    routed_oracle,
    routing,
    stacked,
)

from shardwise.ops.moe.contract import FP8Scales
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.grouped_plan import GroupedPlan, choose_plan
from shardwise.partition import extent

OPS = torch.ops.auto_deploy
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(experts, top_k, hidden, size, tokens, gated):
    """(x, ids, weights), ids one past both ends and repeated, each token with an expert; (first, second) in bf16."""
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids, weights = routing(tokens, top_k, experts, "cuda")
    ids[:, 0].clamp_(0, experts - 1)
    return (x, ids, weights), stacked(experts, hidden, size, gated, "cuda", torch.bfloat16)


SIZES = [
    *((128, 8, 2048, 768, tokens) for tokens in (1, 3, 4, 16, 100, 400, 1500, 9000)),  # Qwen3-30B-A3B
    *((3, 2, 4096, 14336, tokens) for tokens in (1, 2, 70, 500)),  # Mixtral-8x7B, fewer experts
]
sizes = pytest.mark.parametrize("experts,top_k,hidden,size,tokens", SIZES)
SOME = slice(0, 12)
"""Tokens that are held against float64; they meet any expert, in any of its blocks."""


def of(call):
    return tuple(part[SOME] for part in call)


@pytest.mark.parametrize("name", ["triton_moe_fused", "trtllm_moe_fused"])
@sizes
def test_bf16_error_is_at_most_twice_that_of_a_bf16_product(name, experts, top_k, hidden, size, tokens):
    call, stacks = draw(experts, top_k, hidden, size, tokens, True)
    wanted = routed_oracle(*of(call), *stacks)
    plain = relative(OPS.torch_moe_fused(*of(call), *stacks), wanted)
    got = getattr(OPS, name)(*call, *stacks, True, 4)
    assert relative(got[SOME], wanted) <= 2 * plain
    if name == "triton_moe_fused":
        assert torch.equal(got, OPS.triton_moe_fused(*call, *stacks, True, 4))


class Dequantised:
    """A stack of e4m3 experts that become float64 one by one."""

    def __init__(self, weight):
        self.scales = weight.abs().amax(dim=(1, 2)).float() / 448
        self.codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device="cuda")
        for expert, codes in enumerate(self.codes):
            codes.copy_((weight[expert].float() / self.scales[expert]).clamp(-448, 448))
        self.shape = weight.shape

    def __getitem__(self, expert):
        return self.codes[expert].double() * self.scales[expert].double()


@sizes
def test_fp8_error_is_at_most_twice_that_of_the_librarys_products(experts, top_k, hidden, size, tokens):
    call, stacks = draw(experts, top_k, hidden, size, tokens, True)
    v1, v2 = (Dequantised(weight) for weight in stacks)
    q1, s1, q2, s2 = v1.codes, v1.scales, v2.codes, v2.scales
    s_in, s_hidden = torch.full((1,), 5 / 448, device="cuda"), torch.full((1,), 8 / 448, device="cuda")
    wanted = routed_oracle(*of(call), v1, v2, first_step=e4m3_step(s_in), second_step=e4m3_step(s_hidden))
    up, gate = q1.view(torch.uint8).chunk(2, 1)
    lists = [[*half.contiguous().view(torch.float8_e4m3fn)] for half in (gate, up)]
    one, other = [s_in] * experts, [s_hidden] * experts
    library = OPS.torch_quant_fp8_moe(*of(call), lists[0], [*q2], lists[1], one, other, one, [*s1], [*s2], [*s1])
    limit = 2 * relative(library, wanted)
    got = OPS.triton_quant_fp8_moe(*call, q1, q2, q1, s_in, s_hidden, s_in, s1, s2, s1, True, 4)
    assert relative(got[SOME], wanted) <= limit
    got = OPS.trtllm_quant_fp8_moe_fused(*call, q1, q2, s_in, s1 * s_in, 1 / s_hidden, s2 * s_hidden)
    assert relative(got[SOME], wanted) <= limit


@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("gated", [True, False])
def test_fp8_with_scales_of_blocks(tokens, gated):
    """Held over as many tokens as `SOME`, in calls of one too.

    Matrix units keep some 13 bits below the largest of the e4m3 products that they add. That moves up to one in a
    hundred activations across a tie of e4m3, each by a whole step, an eighth or sixteenth of it. Where it is a token's
    largest activation, that alone is 1 to 3 % of the token's result (an H200's single tokens: 0.3 % mostly, of 40 one
    1.3 and one 2.0 %); 12 tokens are off by half a per cent together.
    """
    calls = [fp8_call_with_scales_of_blocks(tokens, gated) for _ in range(SOME.stop if tokens == 1 else 1)]
    got, wanted = (torch.cat(results) for results in zip(*calls, strict=True))
    assert relative(got, wanted) < 1e-2


def fp8_call_with_scales_of_blocks(tokens, gated):
    """(result, what is wanted) of a new draw."""
    call, (first, second) = draw(16, 4, 1024, 768, tokens, gated)
    (q1, s1, v1), (q2, s2, v2) = fp8_block_stack(first, 1 + gated), fp8_block_stack(second, 1)
    s_in, s_hidden = torch.full((1,), 5 / 448, device="cuda"), torch.full((1,), 8 / 448, device="cuda")
    act = 4 if gated else 8
    got = OPS.triton_quant_fp8_moe(*call, q1, q2, q1, s_in, s_hidden, s_in, s1, s2, s1, gated, act)
    return got[SOME], routed_oracle(*of(call), v1, v2, gated, False, e4m3_step(s_in), e4m3_step(s_hidden))


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("gated", [True, False])
def test_nvfp4_error_is_at_most_twice_that_of_a_bf16_product(tokens, gated):
    call, stacks = draw(16, 4, 1024, 768, tokens, gated)
    (c1, b1, g1, n1), (c2, b2, g2, n2) = (nvfp4_stack(weight) for weight in stacks)
    wanted, act = routed_oracle(*of(call), n1, n2, gated), 4 if gated else 8
    up, gate = (n1[:, :768], n1[:, 768:]) if gated else (n1[:0], n1)
    lists = [[*values.bfloat16()] for values in (gate, n2, up)]
    plain = relative(OPS.torch_moe(*of(call), *lists, gated, act), wanted)
    g = torch.tensor(600.0, device="cuda")
    got = OPS.trtllm_quant_nvfp4_moe_fused(*call, c1, c2, b1, b2, g, g, 1 / (g * g1), 1 / (g * g2), gated, act)
    assert relative(got[SOME], wanted) <= 2 * plain


@pytest.mark.parametrize("gated,on_input", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("tokens", [1, 5, 300, 2000])
def test_relu2_and_weights_on_the_input(tokens, gated, on_input):
    call, stacks = draw(16, 4, 1024, 768, tokens, gated)
    for name in ("triton_moe_fused", "trtllm_moe_fused"):
        got = getattr(OPS, name)(*call, *stacks, gated, 4 if gated else 8, "", 0, on_input)
        assert relative(got[SOME], routed_oracle(*of(call), *stacks, gated, on_input)) < 8e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden,size", [(72, 40), (77, 45)])  # rows of 16-byte multiples and others
@pytest.mark.parametrize("tokens", [1, 30, 400])
def test_sizes_that_no_tile_divides(hidden, size, tokens, dtype):
    call, stacks = draw(5, 2, hidden, size, tokens, True)
    got = OPS.triton_moe_fused(call[0].to(dtype), *call[1:], *(w.to(dtype) for w in stacks), True, 4)
    assert relative(got[SOME], routed_oracle(*of(call), *stacks)) < (8e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 64, 900])
def test_expert_parallel_shares_sum_to_the_whole(ranks, tokens):
    (x, ids, weights), stacks = draw(30, 4, 512, 384, tokens, True)
    total = 0
    for rank in range(ranks):
        start, stop = extent(30, ranks, rank)
        part = OPS.triton_moe_fused(x, ids - start, weights, *(w[start:stop] for w in stacks), True, 4)
        total = total + part.double()
    assert relative(total[SOME], routed_oracle(x[SOME], ids[SOME], weights[SOME], *stacks)) < 8e-3


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_a_captured_graph_follows_new_inputs(tokens):
    (x, ids, weights), stacks = draw(32, 4, 512, 384, tokens, True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPS.triton_moe_fused(x, ids, weights, *stacks, True, 4)
    for _ in range(2):
        x.copy_(torch.randn(x.shape, device="cuda"))
        ids.copy_(routing(tokens, 4, 32, "cuda")[0])
        out.fill_(torch.nan)
        graph.replay()
        wanted = routed_oracle(x[SOME], ids[SOME], weights[SOME], *stacks)
        assert (out[SOME] - wanted).norm() <= 8e-3 * wanted.norm()


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("outputs,columns", [(8192, 2880), (4096, 14336), (1000, 520), (40, 77)])
def test_fp8_linear_agrees_with_its_codes(rows, outputs, columns):
    x, weight = torch.randn(rows, columns, device="cuda").bfloat16(), torch.randn(outputs, columns, device="cuda")
    (codes,), (scale,), (values,) = fp8_stack(weight[None])
    s_in = torch.tensor(5 / 448, device="cuda")
    wanted = e4m3_step(s_in)(x.double()) @ values.T
    for name in ("trtllm_quant_fp8_linear", "torch_quant_fp8_linear"):
        assert relative(getattr(OPS, name)(x, codes, None, s_in, scale), wanted) < 5e-3


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens,hidden,size", [(40, 72 * 8, 40 * 8), (700, 512, 384), (3000, 1024, 768)])
def test_one_warp_may_load_for_the_others(tokens, hidden, size, gated, fp8):
    """Whole steps and tiles and parts of them, blocks that are full and not."""
    (x, ids, weights), stacks = draw(9, 3, hidden, size, tokens, gated)
    one, ones, act = torch.ones(1, device="cuda"), torch.ones(9, device="cuda"), "silu" if gated else "relu2"
    scales = FP8Scales(one, ones, one, ones, True) if fp8 else None
    stacks = [w.to(torch.float8_e4m3fn) for w in stacks] if fp8 else stacks
    plan = choose_plan(10**6, 9, 1 if fp8 else 2)
    plain = GroupedPlan(plan.bt, *(replace(shape, specialised=False) for shape in (plan.up, plan.down)))
    assert plan.up.specialised and plan.down.specialised and plan.copied
    got, wanted = (grouped_moe(x, ids, weights, *stacks, act, False, scales, p) for p in (plan, plain))
    assert relative(got, wanted.double()) < 8e-3
    assert torch.equal(got, grouped_moe(x, ids, weights, *stacks, act, False, scales, plan))
