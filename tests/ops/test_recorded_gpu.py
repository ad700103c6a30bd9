"""Operators whose launches are recorded: replays on other tensors give what the operators give as they are written."""

import pytest
import torch
from oracles_moe import fp8_stack, gpt_oss_layer, nvfp4_stack, routing, stacked
from recorded_calls import beside_and_captured, tapes_of

import shardwise.ops  # noqa: F401  (registers the operators)
from shardwise.ops.quantization.fp8 import quantize_fp8
from shardwise.ops.registry import _OPERATORS
from shardwise.ops.tape import Tape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EXPERTS, TOP_K, HIDDEN, SIZE = 8, 2, 256, 128


def rows(tokens):
    return torch.randn(tokens, HIDDEN, device="cuda").bfloat16()


def mixture(tokens, weights, *options):
    return rows(tokens), *routing(tokens, TOP_K, EXPERTS, "cuda"), *weights, *options


def fp8_mixture(tokens):
    first, second = stacked(EXPERTS, HIDDEN, SIZE, True, "cuda", torch.bfloat16)
    (q1, s1, _), (q2, s2, _) = fp8_stack(first), fp8_stack(second)
    scales = (torch.ones(1, device="cuda") for _ in range(3))
    return mixture(tokens, (q1, q2, q1, *scales, s1, s2, s1), True, 4)


def nvfp4_mixture(tokens):
    first, second = stacked(EXPERTS, HIDDEN, SIZE, True, "cuda", torch.bfloat16)
    (c1, k1, g1, _), (c2, k2, g2, _) = nvfp4_stack(first), nvfp4_stack(second)
    scales = [torch.tensor(600.0, device="cuda") for _ in range(2)]
    return mixture(tokens, (c1, c2, k1, k2, *scales, 1 / (600 * g1), 1 / (600 * g2)))


def mxfp4_mixture(tokens):
    layer = gpt_oss_layer(EXPERTS, HIDDEN, SIZE, "cuda", torch.bfloat16)
    up = layer.gate_up, layer.gate_up_bias, layer.gate_up_scales
    router = layer.router.bfloat16(), layer.router_bias
    return rows(tokens), *router, TOP_K, *up, 1.702, 7.0, layer.down, layer.down_bias, layer.down_scales


def fp8_linear(tokens):
    codes, scale = quantize_fp8(torch.randn(384, HIDDEN, device="cuda").bfloat16() / 16)
    return rows(tokens), codes, None, torch.tensor(5 / 448, device="cuda"), scale


CASES = {
    "triton_moe_fused": lambda tokens: mixture(
        tokens, stacked(EXPERTS, HIDDEN, SIZE, True, "cuda", torch.bfloat16), True, 4
    ),
    "triton_quant_fp8_moe": fp8_mixture,
    "trtllm_quant_nvfp4_moe_fused": nvfp4_mixture,
    "triton_mxfp4_moe": mxfp4_mixture,
    "trtllm_quant_fp8_linear": fp8_linear,
}


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("name", CASES)
def test_replays_give_what_the_operator_gives(name, tokens):
    operator, called = _OPERATORS[f"auto_deploy::{name}"].implementation, getattr(torch.ops.auto_deploy, name)
    operator.layouts.clear()
    kept = []
    for _ in range(5):
        args = CASES[name](tokens)
        kept.append((args, called(*args)))
    assert tapes_of(operator.layouts) and all(isinstance(tape, Tape) for tape in tapes_of(operator.layouts))
    for args, result in kept:
        assert torch.equal(result, operator.__wrapped__(*args))


@pytest.mark.parametrize("name", CASES)
def test_other_streams_and_graphs_have_calls_of_their_own(name):
    called, args = getattr(torch.ops.auto_deploy, name), CASES[name](3)
    expected = [called(*args) for _ in range(3)][-1].clone()
    beside, graph, captured = beside_and_captured(lambda: called(*args))
    args[0].copy_(args[0].flip(0) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in beside)
    assert torch.equal(captured, called(*args))
