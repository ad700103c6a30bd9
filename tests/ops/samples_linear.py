"""Samples of the linear layer and the dense router."""

import torch
from operator_samples import Sample


def linear(input, weight, bias):
    out = input.double() @ weight.double().T
    return (out if bias is None else out + bias.double(),)


def router(hidden, weight, bias, top_k=2):
    logits = linear(hidden.reshape(-1, hidden.shape[-1]), weight, bias)[0]
    kept = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    return (kept.softmax(-1),)


def arguments(*shape, out=6, bias=True, extra=()):
    def build(device):
        x, weight = torch.randn(*shape, device=device), torch.randn(out, shape[-1], device=device)
        return x, weight, torch.randn(out, device=device) if bias else None, *extra

    return build


SAMPLES = [
    Sample(op="torch_linear_simple", build=arguments(2, 3, 8), oracle=linear, atol=1e-4, traced=True),
    Sample(op="torch_linear_simple", build=arguments(0, 8, bias=False), oracle=linear, note="empty"),
    Sample(op="torch_moe_router", build=arguments(2, 3, 8), oracle=router, atol=1e-4, traced=True),
    Sample(op="torch_moe_router", build=arguments(7, 8, extra=(6,)), oracle=router, atol=1e-4, note="all experts"),
]
