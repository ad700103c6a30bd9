"""Mixture of experts with given routing on grouped GEMMs: bf16 and fp16 weights, and e4m3 weights with scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.moe.grouped_gemm import grouped_gemm
from shardwise.ops.moe.mxfp4 import WIDE_TOKENS
from shardwise.ops.moe.routing import Routing, combine, group_pairs, most_blocks, multiprocessors
from shardwise.ops.moe.tiles import Plan, Tiles
from shardwise.ops.moe.workspace import Workspace
from shardwise.ops.quantization.triton_fp8 import quantize
from shardwise.ops.triton_support import Launcher, aligned, dependent_launch, interpreting

_gemm = Launcher(grouped_gemm)


@dataclass(frozen=True)
class FP8Scales:
    """Scales of an e4m3 mixture: value = code * scale."""

    input: Tensor  # float32 [1], of x
    first: Tensor  # float32 [E], of the first product: input scale * weight scale
    inner: Tensor  # float32 [1], of the activation
    second: Tensor  # float32 [E], of the second product


def choose_plan(pairs: int, experts: int) -> Plan:
    """Few pairs an expert: narrow token blocks, to read weights at memory rate. Many: wide ones."""
    each = pairs / max(1, experts)
    if each <= 16:
        return Plan(16, Tiles(64, 64, 4, 4, 3), Tiles(64, 64, 4, 6, 3, 2 if pairs <= 8 else 1))
    if each <= 64:
        return Plan(64, Tiles(64, 64, 4, 4, 2), Tiles(64, 64, 4, 4, 3))
    return Plan(128, Tiles(64, 64, 4, 3, 2), Tiles(128, 64, 8, 3, 2))


def grouped_moe(
    tokens: Tensor,  # [T, H], contiguous
    ids: Tensor,  # int [T, K], local; others are skipped
    weights: Tensor,  # [T, K]
    first: Tensor,  # [E, 2I, H] (up, gate) or [E, I, H]
    second: Tensor,  # [E, H, I]
    act: str,
    on_input: bool = False,
    scales: FP8Scales | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Routed sum [T, H] in tokens' dtype; `act` is "silu" (gated) or "relu2"."""
    count, hidden = tokens.shape
    experts, size = first.shape[0], second.shape[2]
    pairs = ids.numel()
    if pairs == 0 or experts == 0:
        return torch.zeros_like(tokens)
    if pairs * max(hidden, first.shape[1]) >= 2**31:
        raise ValueError(f"{pairs} pairs x {max(hidden, first.shape[1])} columns exceed 2**31 elements")
    plan = plan or choose_plan(pairs, experts)
    space = Workspace.of(tokens.device, count)
    order = space.take("order", (pairs,), torch.int32)
    blocks = space.take("blocks", (1 + 3 * most_blocks(pairs, experts, plan.bt),), torch.int32)
    routing = Routing(ids.contiguous(), weights.contiguous(), order, blocks, 0, experts)
    group_pairs(routing, plan.bt)
    x = tokens if scales is None else quantize(tokens, scales.input)
    inner = space.take("inner", (pairs, size), x.dtype)
    wide = torch.float32 if count <= WIDE_TOKENS else tokens.dtype
    values = space.take("values", (plan.down.splits, pairs, hidden), wide)
    up_scale, down_scale = (None, None) if scales is None else (scales.first, scales.second)
    inner_scale = None if scales is None else scales.inner
    _run_gemm(plan.up, plan.bt, x, first, inner, routing, act, True, on_input, up_scale, inner_scale)
    _run_gemm(plan.down, plan.bt, inner, second, values, routing, "none", False, False, down_scale, None)
    return combine(values, routing, tokens.dtype, weighted=not on_input)


def _run_gemm(tiles, bt, x, w, out, routing, act, gather, weight_in, scale, quant) -> None:
    rows, columns, pairs = out.shape[-1], w.shape[2], routing.order.shape[0]
    device, pdl = x.device, dependent_launch(x.device)
    even = columns % (tiles.bk * tiles.splits) == 0
    bound = most_blocks(pairs, routing.local, bt) * -(-rows // tiles.bn) * tiles.splits
    constants = (
        (routing.ids.shape[1], gather, act, scale is not None, quant is not None, weight_in)
        + (tiles.bn, bt, tiles.bk, tiles.splits, even, tiles.stages, interpreting(), pdl)
    )  # fmt: skip
    absent = routing.order  # stands for an argument that the kernel does not read
    scale, quant = absent if scale is None else scale, absent if quant is None else quant
    key = (x.dtype, w.dtype, out.dtype, routing.weights.dtype, columns, rows, tiles.warps, constants)
    _gemm(
        device,
        (*key, aligned(x, w, out, scale, quant, routing.weights)),
        (min(bound, tiles.per_sm * multiprocessors(device)), 1, 1),
        (x, w, out, routing.order, routing.blocks, scale, quant, routing.weights, pairs, columns, rows, x.stride(0))
        + constants,
        num_warps=tiles.warps,
        launch_pdl=pdl,
    )
