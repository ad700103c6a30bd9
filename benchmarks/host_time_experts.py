"""Host time of mixtures of experts at the sizes of a rank of Qwen3-30B-A3B, and of gpt-oss' form of them."""

from collections.abc import Iterator
from functools import partial

import torch
from host_time import Later, Row, launches
from ops_attention import random

from shardwise.ops.moe.contract import SILU

OPS = torch.ops.auto_deploy
EXPERTS, HIDDEN, SIZE, TOP_K = 32, 2048, 768, 8
GPT_OSS = 4, 1.702, 7.0
"""Choices of a token, alpha and limit"""
RANKS, RANK = 4, 1
"""Of the form for a rank's experts, whose router knows all"""


def expert_rows() -> Iterator[Later]:
    """Beyond their own launches, as many as a graph counts."""
    for tokens in (1, 128):
        for name, args in _calls(tokens).items():
            row = f"{name}, {tokens} tokens"
            yield Later(row, partial(_row, row, partial(getattr(OPS, name), *args)))


def _row(name: str, call: partial) -> Row:
    return Row(name, call, launches(call))


def _calls(tokens: int) -> dict[str, tuple]:
    """By operator, their arguments."""
    first, second = random(EXPERTS, 2 * SIZE, HIDDEN), random(EXPERTS, HIDDEN, SIZE)
    codes = first.to(torch.float8_e4m3fn), second.to(torch.float8_e4m3fn)
    scales = [torch.ones(1, device="cuda") for _ in range(4)] + [torch.ones(EXPERTS, device="cuda") for _ in range(3)]
    one, another, each, every = scales[0], scales[1], scales[4], scales[5]
    x, weights = random(tokens, HIDDEN), torch.rand(tokens, TOP_K, device="cuda")
    routed = x, torch.randint(0, EXPERTS, (tokens, TOP_K), device="cuda"), weights
    top_k, alpha, limit = GPT_OSS
    router, all_experts = (random(EXPERTS, HIDDEN), random(EXPERTS)), RANKS * EXPERTS
    mxfp4 = top_k, *_mxfp4(2 * SIZE, HIDDEN), alpha, limit, *_mxfp4(HIDDEN, SIZE)
    nvfp4 = (_bytes(EXPERTS, 2 * SIZE, HIDDEN // 2), _bytes(EXPERTS, HIDDEN, SIZE // 2),
             _bytes(EXPERTS, 2 * SIZE, HIDDEN // 16), _bytes(EXPERTS, HIDDEN, SIZE // 16))  # fmt: skip
    return {
        "triton_moe_fused": (*routed, first, second, True, SILU),
        "trtllm_moe_fused": (*routed, first, second, True, SILU),
        "triton_quant_fp8_moe": (*routed, *codes, *scales, True, SILU),
        "trtllm_quant_fp8_moe_fused": (*routed, *codes, one, each, another, every, True, SILU),
        "triton_mxfp4_moe": (x, *router, *mxfp4),
        "triton_mxfp4_moe_ep": (x, random(all_experts, HIDDEN), random(all_experts), *mxfp4, RANKS, RANK),
        "trtllm_quant_nvfp4_moe_fused": (*routed, *nvfp4, one, another, each, every),
    }


def _mxfp4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks, bias and scales."""
    scales = torch.randint(117, 122, (EXPERTS, rows, columns // 32), dtype=torch.uint8, device="cuda")
    return _bytes(EXPERTS, rows, columns // 32, 16), random(EXPERTS, rows), scales


def _bytes(*shape: int) -> torch.Tensor:
    """Four-bit codes, or scales in e4m3 below 2."""
    return torch.randint(0, 64, shape, dtype=torch.uint8, device="cuda")
