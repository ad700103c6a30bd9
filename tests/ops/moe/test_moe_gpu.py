"""MoE kernels on a GPU at real sizes: error beside that of a bf16 GEMM, graphs, determinism, unread memory."""

import pytest
import torch
from oracles_moe import (
    ALPHA,
    LIMIT,
    gpt_oss_layer,
    gpt_oss_oracle,
    relative,
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


@pytest.mark.parametrize(
    "experts,hidden,size,tokens,top_k",
    [(6, 96, 64, 5, 2), (8, 2880, 192, 16, 4), (3, 160, 96, 90, 2), (2, 64, 32, 1, 1), (130, 128, 64, 33, 8)],
)
def test_small_layers_of_any_number_of_experts(experts, hidden, size, tokens, top_k):
    small = gpt_oss_layer(experts, hidden, size, "cuda", torch.bfloat16)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    wanted = gpt_oss_oracle(x, small, top_k)
    plain = relative(gpt_oss_oracle(x, small, top_k, torch.bfloat16), wanted)
    assert relative(OPS.triton_mxfp4_moe(x, *small.arguments(top_k)), wanted) <= 2 * plain


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
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
