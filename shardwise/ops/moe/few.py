"""Mixture of experts for a token or a few: host side of `few_kernels.py`."""

import torch
from torch import Tensor

from shardwise.ops.moe.contract import FP8Scales
from shardwise.ops.moe.few_kernels import few_down, few_up
from shardwise.ops.moe.grouped_plan import FewPlan
from shardwise.ops.moe.routing import power_of_two
from shardwise.ops.moe.workspace import Workspace
from shardwise.ops.triton_support import Launcher, aligned, dependent_launch, interpreting

_up, _down = Launcher(few_up), Launcher(few_down)
AHEAD_BYTES = 1024
"""Of every row of the second product that are asked for before the first is done."""


def few_moe(
    tokens: Tensor,  # [T, H], contiguous
    ids: Tensor,  # int [T, K], contiguous
    weights: Tensor,  # [T, K], contiguous
    first: Tensor,  # [E, 2I, H] (up, gate) or [E, I, H]
    second: Tensor,  # [E, H, I]
    act: str,
    on_input: bool,
    scales: FP8Scales | None,
    plan: FewPlan,
) -> Tensor:
    """Routed sum [T, H] as `grouped_moe`; no scales of blocks."""
    count, hidden = tokens.shape
    pairs, top_k = ids.numel(), ids.shape[1]
    size, device, pdl = second.shape[2], tokens.device, dependent_launch(tokens.device)
    inner = Workspace.of(device, count).take("inner", (pairs, size), first.dtype)
    out = torch.empty_like(tokens)
    scaled, factored = scales is not None, scales is not None and scales.factored
    s1, in_scale, inner_scale, s2 = (
        (ids,) * 4 if scales is None else (scales.first, scales.input, scales.inner, scales.second)
    )
    how = ("divide" if factored else "multiply") if scaled else ""
    vector = 16 // first.element_size()
    up, down = plan.up, plan.down
    up_bk, down_bk = (shape.step // first.element_size() for shape in (up, down))
    common = (interpreting(), pdl)
    kinds = (tokens.dtype, first.dtype, ids.dtype, weights.dtype, first.shape[0] == 1, hidden, size, plan)
    up_constants = (
        (top_k, act, scaled, factored, how, on_input, up.rows, up_bk, vector, up.stages, hidden % up_bk == 0) + common
    )  # fmt: skip
    _up(
        device,
        (*kinds, aligned(tokens, first, inner, ids, weights, s1, in_scale, inner_scale), up_constants),
        (pairs, -(-size // up.rows), 1),
        (tokens, first, inner, ids, weights, s1, in_scale, in_scale, inner_scale, first.shape[0], hidden, size)
        + up_constants,
        num_warps=up.warps,
        launch_pdl=pdl,
    )
    ahead = 0 if interpreting() else power_of_two(-(-min(AHEAD_BYTES, size * first.element_size()) // 128))
    down_constants = (
        (top_k, power_of_two(top_k), scaled, factored, not on_input, down.rows, down_bk, vector, down.stages)
        + (size % down_bk == 0, ahead)
        + common
    )  # fmt: skip
    _down(
        device,
        (*kinds, aligned(inner, second, out, ids, weights, s2, inner_scale), down_constants),
        (-(-hidden // down.rows), count, 1),
        (inner, second, out, ids, weights, s2, inner_scale, first.shape[0], size, hidden) + down_constants,
        num_warps=down.warps,
        launch_pdl=pdl,
    )
    return out
