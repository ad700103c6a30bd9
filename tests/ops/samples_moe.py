"""Samples of the mixture-of-experts operators."""

import torch
from operator_samples import Sample
from oracles_moe import (
    GptOssLayer,
    e4m3_step,
    fp8_stack,
    gpt_oss_layer,
    gpt_oss_oracle,
    nvfp4_stack,
    routed_oracle,
    routing,
    stacked,
)

from shardwise.ops.quantization import nvfp4

T, E, K, H, I = 5, 4, 2, 64, 48
SIZES = (E, H, I)


def call(device, gated):
    x = torch.randn(T, H, device=device)
    return (x, *routing(T, K, E, device), *stacked(*SIZES, gated, device))


def lists(first, second, gated):
    """(w1, w2, w3) as lists, up rows before gate rows in a stack."""
    if not gated:
        return list(first), list(second), []
    return [w[I:].contiguous() for w in first], list(second), [w[:I].contiguous() for w in first]


def unlisted(w1, w2, w3):
    first = torch.stack([torch.cat(pair) for pair in zip(w3, w1, strict=True)]) if w3 else torch.stack(w1)
    return first, torch.stack(w2)


def listed_args(gated, on_input=False):
    def build(device):
        x, ids, weights, *stacks = call(device, gated)
        return x.view(1, T, H), ids, weights, *lists(*stacks, gated), gated, 4 if gated else 8, "", 0, on_input

    return build


def listed(x, ids, weights, w1, w2, w3, gated, act, mapping, limit, on_input):
    return (routed_oracle(x[0], ids, weights, *unlisted(w1, w2, w3), gated, on_input)[None],)


def fused_args(gated, *tail):
    return lambda device: (*call(device, gated), *tail)


def fused(x, ids, weights, first, second, gated=True, act=4, mapping="", limit=0, on_input=False):
    return (routed_oracle(x, ids, weights, first, second, gated, on_input),)


def fused_relu2(x, ids, weights, first, second):
    return fused(x, ids, weights, first, second, gated=False)


def fp8_lists(gated):
    def build(device):
        x, ids, weights, first, second = call(device, gated)
        (q1, s1, _), (q2, s2, _) = fp8_stack(first), fp8_stack(second)
        s_in, s_hidden = torch.tensor(4 / 448, device=device), torch.tensor(8 / 448, device=device)
        w1, w2, w3 = lists(q1, q2, gated)
        again = [s_in] * len(w3), [*s1] * (len(w3) > 0)
        return (
            *(x, ids, weights, w1, w2, w3, [s_in] * E, [s_hidden] * E, again[0], [*s1], [*s2], again[1]),
            *(gated, 4 if gated else 8),
        )

    return build


def fp8_listed(x, ids, weights, w1, w2, w3, in1, in2, in3, s1, s2, s3, gated, act):
    first, second = unlisted([w.double() for w in w1], [w.double() for w in w2], [w.double() for w in w3])
    scaled = [w * torch.stack(s).double()[:, None, None] for w, s in ((first, s1), (second, s2))]
    steps = e4m3_step(in1[0]), e4m3_step(in2[0])
    return (routed_oracle(x, ids, weights, *scaled, gated, False, *steps),)


def fp8_stacked(gated):
    def build(device):
        x, ids, weights, first, second = call(device, gated)
        (q1, s1, _), (q2, s2, _) = fp8_stack(first), fp8_stack(second)
        s_in, s_hidden = torch.full((1,), 4 / 448, device=device), torch.full((1,), 8 / 448, device=device)
        none = torch.empty(0, device=device)
        return x, ids, weights, q1, q2, none, s_in, s_hidden, none, s1, s2, none, gated, 4

    return build


def fp8_grouped(x, ids, weights, q1, q2, _w3, s_in, s_hidden, _in3, s1, s2, _s3, gated, act):
    scaled = [q.double() * s.double()[:, None, None] for q, s in ((q1, s1), (q2, s2))]
    steps = e4m3_step(s_in[0]), e4m3_step(s_hidden[0])
    return (routed_oracle(x, ids, weights, *scaled, gated, False, *steps),)


def fp8_trtllm(device):
    x, ids, weights, q1, q2, _, s_in, s_hidden, _, s1, s2, _, gated, act = fp8_stacked(True)(device)
    return x, ids, weights, q1, q2, s_in[0], s1 * s_in, 1 / s_hidden[0], s2 * s_hidden, gated, act


def fp8_trtllm_oracle(x, ids, weights, q1, q2, s_in, d1, reciprocal, d2, gated, act):
    s_hidden = 1 / reciprocal
    scales = d1 / s_in, d2 / s_hidden
    scaled = [q.double() * s.double()[:, None, None] for q, s in zip((q1, q2), scales, strict=True)]
    return (routed_oracle(x, ids, weights, *scaled, gated, False, e4m3_step(s_in), e4m3_step(s_hidden)),)


def nvfp4_parts(device, gated):
    x, ids, weights, first, second = call(device, gated)
    (c1, s1, g1, _), (c2, s2, g2, _) = nvfp4_stack(first), nvfp4_stack(second)
    return x, ids, weights, (c1, s1, g1), (c2, s2, g2), torch.tensor(600.0, device=device)


def nvfp4_lists(device):
    x, ids, weights, (c1, s1, g1), (c2, s2, g2), g = nvfp4_parts(device, False)
    flat1, flat2 = [s.flatten() for s in s1], [s.flatten() for s in s2]
    alpha1, alpha2 = [*(1 / (g * g1))], [*(1 / (g * g2))]
    return (
        *(x, ids, weights, [*c1], [*c2], [], [g] * E, [g] * E, [], flat1, flat2, [], alpha1, alpha2, []),
        *(False, 8),
    )


def nvfp4_values(codes, scales, factor):
    rows, columns = codes.shape[0], codes.shape[1] * 2
    plain = nvfp4.unswizzle_scales(scales, rows, columns // 16)
    return nvfp4.dequantize_nvfp4(codes, plain).double() * factor.double()


def nvfp4_step(g):
    return lambda row: nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(row.float()[None], g), g)[0].double()


def nvfp4_listed(x, ids, weights, w1, w2, w3, in1, in2, in3, s1, s2, s3, a1, a2, a3, gated, act):
    first = torch.stack([nvfp4_values(*parts) for parts in zip(w1, s1, [a * in1[0] for a in a1], strict=True)])
    second = torch.stack([nvfp4_values(*parts) for parts in zip(w2, s2, [a * in2[0] for a in a2], strict=True)])
    return (routed_oracle(x, ids, weights, first, second, gated, False, nvfp4_step(in1[0]), nvfp4_step(in2[0])),)


def nvfp4_trtllm(gated):
    def build(device):
        x, ids, weights, (c1, s1, g1), (c2, s2, g2), g = nvfp4_parts(device, gated)
        return x, ids, weights, c1, c2, s1, s2, g, g, 1 / (g * g1), 1 / (g * g2), gated, 4 if gated else 8

    return build


def nvfp4_trtllm_oracle(x, ids, weights, c1, c2, s1, s2, g1, g2, a1, a2, gated, act):
    """Weights only: activations are not rounded."""
    first = torch.stack([nvfp4_values(c, s, a * g1) for c, s, a in zip(c1, s1, a1, strict=True)])
    second = torch.stack([nvfp4_values(c, s, a * g2) for c, s, a in zip(c2, s2, a2, strict=True)])
    return (routed_oracle(x, ids, weights, first, second, gated),)


def dense(device):
    x, chosen = torch.randn(2, 3, 16, device=device), torch.rand(6, 3, device=device)
    first, second = torch.randn(3, 16, 48, device=device) / 4, torch.randn(3, 24, 16, device=device) / 5
    return x, chosen, first, torch.randn(3, 48, device=device), second, torch.randn(3, 16, device=device), 1.702, 7.0


def dense_oracle(x, chosen, first, first_bias, second, second_bias, alpha, limit):
    z = torch.einsum("th,eho->teo", x.double().flatten(0, 1), first.double()) + first_bias.double()
    gate, up = z[..., 0::2].clamp(max=limit), z[..., 1::2].clamp(-limit, limit)
    y = torch.einsum("tei,eih->teh", (up + 1) * gate * torch.sigmoid(alpha * gate), second.double())
    return (((y + second_bias.double()) * chosen.double()[..., None]).sum(1).view(x.shape),)


def gpt_oss(*tail):
    def build(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16  # what a GPU need not round before it routes
        # The interpreter takes half a second an expert of one partial tile; more sizes in test_moe_mxfp4.py.
        experts, tokens, hidden, size = (3, 2, 32, 32) if device == "cpu" else (6, T, 96, 64)
        layer = gpt_oss_layer(experts, hidden, size, device, dtype)
        return (
            torch.randn(1, tokens, hidden, device=device).to(dtype),
            *(layer.shard(*tail) if tail else layer).arguments(2),
            *tail,
        )

    return build


def gpt_oss_whole(x, router, bias, top_k, gu, gub, gus, alpha, limit, down, down_bias, down_scales):
    return (gpt_oss_oracle(x[0], GptOssLayer(router, bias, gu, gub, gus, down, down_bias, down_scales), top_k)[None],)


# Rows of bf16 products on a GPU; the same kernels in the interpreter are held to 1e-5 in test_moe_mxfp4.py.
BF16 = 3e-2
# A value on the edge between two codes may fall to either side, in float32 and float64.
CODES = 2e-2
# So much do results move when one of relu2's larger values does; a GPU's e4m3 products keep 14 bits of their sums.
LARGER_CODES = 0.15
SAMPLES = [
    Sample(op="torch_moe", build=listed_args(True), oracle=listed, traced=True),
    Sample(op="torch_moe", build=listed_args(False, True), oracle=listed, note="relu2, weight on input"),
    Sample(op="torch_moe_fused", build=fused_args(True), oracle=fused, traced=True),
    Sample(op="torch_moe_dense_mlp", build=dense, oracle=dense_oracle, traced=True),
    Sample(op="torch_quant_fp8_moe", build=fp8_lists(True), oracle=fp8_listed, atol=CODES, traced=True),
    Sample(op="torch_quant_fp8_moe", build=fp8_lists(False), oracle=fp8_listed, atol=LARGER_CODES, note="relu2"),
    Sample(op="torch_quant_nvfp4_moe", build=nvfp4_lists, oracle=nvfp4_listed, atol=CODES, traced=True),
    Sample(op="triton_moe_fused", build=fused_args(False), oracle=fused_relu2, atol=BF16, traced=True),
    Sample(op="triton_moe_fused", build=fused_args(True, True, 4), oracle=fused, atol=BF16, note="gated"),
    Sample(op="triton_quant_fp8_moe", build=fp8_stacked(True), oracle=fp8_grouped, atol=CODES, traced=True),
    Sample(op="triton_mxfp4_moe", build=gpt_oss(), oracle=gpt_oss_whole, atol=BF16, traced=True),
    Sample(op="triton_mxfp4_moe_ep", build=gpt_oss(4, 1), traced=True),
    Sample(op="trtllm_moe_fused", build=fused_args(True), oracle=fused, atol=BF16, traced=True),
    Sample(op="trtllm_quant_fp8_moe_fused", build=fp8_trtllm, oracle=fp8_trtllm_oracle, atol=CODES, traced=True),
    Sample(
        op="trtllm_quant_nvfp4_moe_fused", build=nvfp4_trtllm(True), oracle=nvfp4_trtllm_oracle, atol=BF16, traced=True
    ),
]
