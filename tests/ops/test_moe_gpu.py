"""MoE kernels on a GPU at real sizes: error beside that of a bf16 GEMM, graphs, determinism, unread memory."""

import pytest
import torch
from oracles_moe import (
    ALPHA,
    LIMIT,
    e4m3_step,
    fp8_stack,
    gpt_oss_layer,
    gpt_oss_oracle,
    nvfp4_stack,
    relative,
    routed_oracle,
    routing,
    stacked,
)

from shardwise.ops.moe.mxfp4 import mxfp4_moe
from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.ops.moe.triton import prepare_mxfp4

OPS = torch.ops.auto_deploy
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return gpt_oss_layer(32, 2880, 2880, "cuda", torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 300, 1024, 2500])
def test_error_is_at_most_twice_that_of_a_bf16_product(layer, tokens):
    x = torch.randn(tokens, 2880, device="cuda").bfloat16()
    wanted = gpt_oss_oracle(x, layer, 4)
    plain = relative(gpt_oss_oracle(x, layer, 4, torch.bfloat16), wanted)
    got = OPS.triton_mxfp4_moe(x, *layer.arguments(4))
    assert relative(got, wanted) <= 2 * plain
    assert torch.equal(got, OPS.triton_mxfp4_moe(x, *layer.arguments(4)))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_expert_parallel_sums_to_the_whole(layer, ranks):
    x = torch.randn(40, 2880, device="cuda").bfloat16()
    parts = [
        OPS.triton_mxfp4_moe_ep(x, *layer.shard(ranks, rank).arguments(4), ranks, rank).double()
        for rank in range(ranks)
    ]
    assert relative(sum(parts), gpt_oss_oracle(x, layer, 4)) < 5e-3


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_a_captured_graph_follows_new_inputs(layer, tokens):
    x = torch.randn(tokens, 2880, device="cuda").bfloat16()
    prepare_mxfp4(
        *(layer.gate_up, layer.gate_up_scales, layer.gate_up_bias, layer.down, layer.down_scales, layer.down_bias)
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OPS.triton_mxfp4_moe(x, *layer.arguments(4))
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPS.triton_mxfp4_moe(x, *layer.arguments(4))
    for _ in range(3):
        x.copy_(torch.randn(tokens, 2880, device="cuda"))
        out.fill_(torch.nan)
        graph.replay()
        assert relative(out, gpt_oss_oracle(x, layer, 4)) < 5e-3


def test_nothing_beyond_the_tokens_is_read(layer):
    up = pack_mxfp4(layer.gate_up, layer.gate_up_scales, layer.gate_up_bias, paired=True)
    down = pack_mxfp4(layer.down, layer.down_scales, layer.down_bias, paired=False)
    space = torch.full((64, 2880), torch.nan, device="cuda", dtype=torch.bfloat16)
    space[:5] = torch.randn(5, 2880, device="cuda")
    got = mxfp4_moe(space[:5], layer.router, layer.router_bias, 4, up, down, ALPHA, LIMIT, 0)
    assert relative(got, gpt_oss_oracle(space[:5], layer, 4)) < 5e-3


SIZES = [(16, 8, 512, 384, 200), (8, 2, 1024, 1536, 1100)]  # experts, top-k, hidden, intermediate, tokens


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("experts,top_k,hidden,size,tokens", SIZES)
def test_grouped_bf16_fp8_and_nvfp4(experts, top_k, hidden, size, tokens, gated):
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids, weights = routing(tokens, top_k, experts, "cuda")
    first, second = stacked(experts, hidden, size, gated, "cuda", torch.bfloat16)
    act, some = 4 if gated else 8, slice(0, 24)

    def oracle(*stacks, **steps):
        return routed_oracle(x[some], ids[some], weights[some], *stacks, gated, **steps)

    for name in ("triton_moe_fused", "trtllm_moe_fused"):
        got = getattr(OPS, name)(x, ids, weights, first, second, gated, act)
        assert relative(got[some], oracle(first, second)) < 8e-3
    (q1, s1, v1), (q2, s2, v2) = fp8_stack(first), fp8_stack(second)
    s_in, s_hidden = torch.full((1,), 5 / 448, device="cuda"), torch.full((1,), 8 / 448, device="cuda")
    got = OPS.triton_quant_fp8_moe(x, ids, weights, q1, q2, q1, s_in, s_hidden, s_in, s1, s2, s1, gated, act)
    rounded = oracle(v1, v2, first_step=e4m3_step(s_in), second_step=e4m3_step(s_hidden))
    assert relative(got[some], rounded) < 1e-2
    (c1, b1, g1, n1), (c2, b2, g2, n2) = nvfp4_stack(first), nvfp4_stack(second)
    g = torch.tensor(600.0, device="cuda")
    got = OPS.trtllm_quant_nvfp4_moe_fused(
        x, ids, weights, c1, c2, b1, b2, g, g, 1 / (g * g1), 1 / (g * g2), gated, act
    )
    assert relative(got[some], oracle(n1, n2)) < 8e-3


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 300])
def test_fp8_linear_agrees_with_its_codes(rows):
    x, weight = torch.randn(rows, 2880, device="cuda").bfloat16(), torch.randn(4096, 2880, device="cuda")
    (codes,), (scale,), (values,) = fp8_stack(weight[None])
    s_in = torch.tensor(5 / 448, device="cuda")
    wanted = e4m3_step(s_in)(x.double()) @ values.T
    for name in ("trtllm_quant_fp8_linear", "torch_quant_fp8_linear"):
        assert relative(getattr(OPS, name)(x, codes, None, s_in, scale), wanted) < 5e-3
