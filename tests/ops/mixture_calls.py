"""Calls of the mixtures for every way that they are launched: for NVIDIA's memory checker, which needs no results."""

import torch
from oracles_moe import fp8_block_stack, fp8_stack, gpt_oss_layer, nvfp4_stack, routing, stacked

from shardwise.partition import extent

OPS = torch.ops.auto_deploy
EXPERTS, TOP_K = 9, 3
TOKENS = (1, 12, 60, 250, 500)
"""From a third of a pair an expert to more than the 128 of a block."""


def given_routing(device, gated, hidden, size):
    """(label, call) with weights in bf16, e4m3 and NVFP4; ids reach past both ends and repeat."""
    first, second = stacked(EXPERTS, hidden, size, gated, device, torch.bfloat16)
    (q1, s1, _), (q2, s2, _) = fp8_stack(first), fp8_stack(second)
    (b1, t1, _), (b2, t2, _) = fp8_block_stack(first, 1 + gated), fp8_block_stack(second, 1)
    (c1, k1, g1, _), (c2, k2, g2, _) = nvfp4_stack(first), nvfp4_stack(second)
    one, g = torch.ones(1, device=device), torch.tensor(600.0, device=device)
    operators = {
        "triton_moe_fused": (first, second),
        "triton_quant_fp8_moe": (q1, q2, q1, one, one, one, s1, s2, s1),
        "triton_quant_fp8_moe by block": (b1, b2, b1, one, one, one, t1, t2, t1),
        "trtllm_quant_nvfp4_moe_fused": (c1, c2, k1, k2, g, g, 1 / (g * g1), 1 / (g * g2)),
    }
    for tokens in TOKENS:
        inputs = torch.randn(tokens, hidden, device=device).bfloat16(), *routing(tokens, TOP_K, EXPERTS, device)
        for name, weights in operators.items():
            for on_input in (False, True) if tokens in (1, 60) else (False,):
                args = (*inputs, *weights, gated, 4 if gated else 8, "", 0, on_input)
                label = f"{name}-{tokens}{' gated' * gated}{' weights on input' * on_input}"
                yield label, lambda name=name, args=args: getattr(OPS, name.split()[0])(*args)


def gpt_oss(device):
    """(label, call) with MXFP4 weights: all experts, and one rank's of two."""
    layer = gpt_oss_layer(EXPERTS, 288, 160, device, torch.bfloat16)
    for ranks in (1, 2):
        part = slice(*extent(EXPERTS, ranks, ranks - 1))
        up = [w[part] for w in (layer.gate_up, layer.gate_up_bias, layer.gate_up_scales)]
        down = [w[part] for w in (layer.down, layer.down_bias, layer.down_scales)]
        for tokens in (*TOKENS, 2000):
            x = torch.randn(tokens, 288, device=device).bfloat16()
            args = (x, layer.router, layer.router_bias, TOP_K, *up, 1.702, 7.0, *down, ranks, ranks - 1)
            yield f"triton_mxfp4_moe_ep-{tokens} of {ranks}", lambda args=args: OPS.triton_mxfp4_moe_ep(*args)


def mixture_calls(device):
    """All of them; sizes are multiples of 16 bytes, but of no tile."""
    yield from given_routing(device, True, 272, 208)
    yield from given_routing(device, False, 304, 144)
    yield from gpt_oss(device)
