"""Mixture of experts for a token or a few: host side of `few_kernels.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.moe.contract import FP8Scales, WeightScales
from shardwise.ops.moe.few_kernels import few_down, few_up
from shardwise.ops.moe.grouped_plan import FewPlan
from shardwise.ops.moe.routing import power_of_two
from shardwise.ops.triton_support import dependent_launch, interpreting
from shardwise.ops.workspace import Workspace

_up, _down = Launcher(few_up), Launcher(few_down)
DOWN_AHEAD_BYTES = 1024
"""Of every row of the second product that are asked for before the first is done."""


@dataclass(frozen=True)
class _Call:
    """What both launches need to know."""

    ids: Tensor
    weights: Tensor
    act: str
    on_input: bool
    scales: FP8Scales | WeightScales | None
    plan: FewPlan

    @property
    def quantised(self) -> FP8Scales | None:
        """Where activations are quantised too."""
        return self.scales if isinstance(self.scales, FP8Scales) else None

    @property
    def scaling(self) -> tuple[bool, bool]:
        """Whether experts have scales, and whether these are factors of the results."""
        return self.quantised is not None, self.quantised is not None and self.quantised.factored

    @property
    def grain(self) -> str:
        """Of scales of weights alone."""
        return "" if not isinstance(self.scales, WeightScales) else "tile" if self.scales.tiled else "channel"

    def key(self, x: Tensor, weight: Tensor, *pointers: Tensor) -> tuple:
        """Of a launch's compiled form, but for its constants."""
        kinds = (x.dtype, weight.dtype, self.ids.dtype, self.weights.dtype, weight.shape, self.plan)
        return *kinds, aligned(x, weight, self.ids, self.weights, *pointers)


def few_moe(
    tokens: Tensor,  # [T, H], contiguous
    ids: Tensor,  # int [T, K], contiguous
    weights: Tensor,  # [T, K], contiguous
    first: Tensor,  # [E, 2I, H] (up, gate) or [E, I, H]
    second: Tensor,  # [E, H, I]
    act: str,
    on_input: bool,
    scales: FP8Scales | WeightScales | None,
    plan: FewPlan,
) -> Tensor:
    """Routed sum [T, H] as `grouped_moe`; no `FP8Scales` of blocks."""
    call = _Call(ids, weights, act, on_input, scales, plan)
    dtype = first.dtype if call.quantised else tokens.dtype
    inner = Workspace.of(tokens.device, tokens.shape[0]).take("inner", (ids.numel(), second.shape[2]), dtype)
    out = torch.empty_like(tokens)
    _launch_up(call, tokens, first, inner)
    _launch_down(call, inner, second, out)
    return out


def _launch_up(call: _Call, x: Tensor, weight: Tensor, inner: Tensor) -> None:
    """The first product with its activation, [T * K, I]."""
    scales, shape, ids, quantised = call.scales, call.plan.up, call.ids, call.quantised
    own = ids if scales is None else scales.first
    of_input, of_inner = (ids, ids) if quantised is None else (quantised.input, quantised.inner)
    hidden, size, pdl = x.shape[1], inner.shape[1], dependent_launch(x.device)
    scaled, factored = call.scaling
    how = ("divide" if factored else "multiply") if scaled else ""
    step = shape.step // weight.element_size()
    constants = (
        (ids.shape[1], call.act, scaled, factored, how, call.on_input, call.grain, shape.rows, step)
        + (16 // weight.element_size(), shape.stages, hidden % step == 0, interpreting(), pdl)
    )  # fmt: skip
    _up(
        x.device,
        (*call.key(x, weight, inner, own, of_input, of_inner), constants),
        (ids.numel(), -(-size // shape.rows), 1),
        (x, weight, inner, ids, call.weights, own, of_input, of_input, of_inner, weight.shape[0], hidden, size)
        + constants,
        num_warps=shape.warps,
        launch_pdl=pdl,
    )


def _launch_down(call: _Call, inner: Tensor, weight: Tensor, out: Tensor) -> None:
    """The second product, summed over each token's choices: [T, H]."""
    scales, shape, ids, quantised = call.scales, call.plan.down, call.ids, call.quantised
    own, of_inner = ids if scales is None else scales.second, ids if quantised is None else quantised.inner
    (count, hidden), size, pdl = out.shape, inner.shape[1], dependent_launch(out.device)
    top_k, width = ids.shape[1], weight.element_size()
    step = shape.step // width
    ahead = 0 if interpreting() else power_of_two(-(-min(DOWN_AHEAD_BYTES, size * width) // 128))
    constants = (
        (top_k, power_of_two(top_k), *call.scaling, not call.on_input, call.grain, shape.rows, step, 16 // width)
        + (shape.stages, size % step == 0, ahead, interpreting(), pdl)
    )  # fmt: skip
    _down(
        out.device,
        (*call.key(inner, weight, out, own, of_inner), out.dtype, constants),
        (-(-hidden // shape.rows), count, 1),
        (inner, weight, out, ids, call.weights, own, of_inner, weight.shape[0], size, hidden) + constants,
        num_warps=shape.warps,
        launch_pdl=pdl,
    )
