"""Mixture of experts with given routing: bf16 and fp16 weights, and e4m3 weights with scales.

A token or a few: two launches of matrix-vector products (`few_kernels.py`). More: grouping -> up GEMM with the
activation -> down GEMM -> weighted sum (`grouped_gemm.py`). Nothing synchronises; sums are in a fixed order.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.ops.gluon_support import ROLES, swizzled_tiles
from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.moe.contract import FP8Scales, WeightScales
from shardwise.ops.moe.few import few_moe
from shardwise.ops.moe.grouped_gemm import gather_rows, grouped_gemm
from shardwise.ops.moe.grouped_plan import FewPlan, GroupedPlan, Shape, choose_few, choose_mixed_plan, choose_plan
from shardwise.ops.moe.routing import Routing, combine, most_blocks, routed
from shardwise.ops.moe.wide_float8 import wide_float8
from shardwise.ops.moe.wide_gemm import wide_gemm
from shardwise.ops.quantization.triton_fp8 import quantize
from shardwise.ops.tensor_memory import matrix_tiles
from shardwise.ops.triton_support import asynchronous_products, dependent_launch, interpreting, multiprocessors
from shardwise.ops.workspace import Workspace

_gemm, _gather, _wide, _wide_float8 = (
    Launcher(kernel) for kernel in (grouped_gemm, gather_rows, wide_gemm, wide_float8)
)
_COPIED_ROWS, _COPIED_BYTES = 8, 2048
"""Rows, and bytes of each, that one program copies."""


@dataclass(frozen=True)
class _Product:
    """One of the two products: x [rows, K] with weights [E, N, K], twice N rows with "silu"."""

    x: Tensor
    weight: Tensor
    out: Tensor  # [pairs, N] by sorted position, or [splits, pairs, N] with by_pair
    sharing: int
    """Pairs that share a row of x, which is gathered; 0: x rows are sorted positions."""
    by_pair: bool
    act: str
    weight_in: bool
    scale: Tensor | None
    factor: Tensor | None
    quant: Tensor | None
    quant_how: str


def grouped_moe(
    tokens: Tensor,  # [T, H], contiguous
    ids: Tensor,  # int [T, K], local; others are skipped
    weights: Tensor,  # [T, K]
    first: Tensor,  # [E, 2I, H] (up, gate) or [E, I, H]
    second: Tensor,  # [E, H, I]
    act: str,
    on_input: bool = False,
    scales: FP8Scales | WeightScales | None = None,
    plan: GroupedPlan | FewPlan | None = None,
) -> Tensor:
    """Routed sum [T, H] in tokens' dtype; `act` is "silu" (gated) or "relu2"."""
    count, hidden = tokens.shape
    experts, size = first.shape[0], second.shape[2]
    pairs, top_k = ids.numel(), ids.shape[1]
    if pairs == 0 or experts == 0:
        return torch.zeros_like(tokens)
    if pairs * max(hidden, first.shape[1]) >= 2**31 or experts * max(hidden, first.shape[1]) >= 2**31:
        raise ValueError(f"{pairs} pairs, {experts} experts x {max(hidden, first.shape[1])} rows exceed 2**31 elements")
    ids, weights = ids.contiguous(), weights.contiguous()
    alone = isinstance(scales, WeightScales)
    blocks = isinstance(scales, FP8Scales) and scales.blocks
    if plan is None and not blocks:
        plan = choose_few(pairs, experts, top_k, first.element_size(), hidden * first.element_size(), alone)
    if isinstance(plan, FewPlan):
        return few_moe(tokens, ids, weights, first, second, act, on_input, scales, plan)
    if plan is None:
        if alone:
            turned = act == "silu" and not on_input and _turns_codes(tokens, first, second)
            plan = choose_mixed_plan(pairs, experts, turned)
        else:
            plan = choose_plan(pairs, experts, first.element_size(), blocks, hidden)
    space = Workspace.of(tokens.device, count)
    routing = routed(space, ids, weights, experts, plan.bt)
    inner = space.take("inner", (pairs, size), tokens.dtype if alone else first.dtype)
    values = space.take("values", (plan.down.splits, pairs, hidden), tokens.dtype)
    up, down = _products(tokens, routing, first, second, act, on_input, scales, inner, values)
    up = _in_order(up, routing) if plan.copied else up
    _run(plan.up, plan.bt, up, routing)
    _run(plan.down, plan.bt, down, routing)
    return combine(values, routing, tokens.dtype, weighted=not on_input)


def _products(tokens, routing, first, second, act, on_input, scales, inner, values) -> tuple[_Product, _Product]:
    top_k = routing.ids.shape[1]
    if scales is None:
        up = _Product(tokens, first, inner, top_k, False, act, on_input, None, None, None, "")
        return up, _Product(inner, second, values, 0, True, "none", False, None, None, None, "")
    if isinstance(scales, WeightScales):
        up = _Product(tokens, first, inner, top_k, False, act, on_input, scales.first, None, None, "")
        return up, _Product(inner, second, values, 0, True, "none", False, scales.second, None, None, "")
    x, sharing = (_weighted(tokens, routing.weights), 1) if on_input else (tokens, top_k)
    factors, how = ((scales.input, scales.inner), "divide") if scales.factored else ((None, None), "multiply")
    x = quantize(x, scales.input)
    up = _Product(x, first, inner, sharing, False, act, False, scales.first, factors[0], scales.inner, how)
    return up, _Product(inner, second, values, 0, True, "none", False, scales.second, factors[1], None, "")


def _in_order(product: _Product, routing: Routing) -> _Product:
    """The product with its rows copied into sorted positions."""
    x, pairs = product.x, routing.order.shape[0]
    device, pdl, columns = x.device, dependent_launch(x.device), x.shape[1]
    rows = torch.empty((pairs, columns), dtype=x.dtype, device=device)
    constants = (_COPIED_ROWS, _COPIED_BYTES // x.element_size(), pdl)
    _gather(
        device,
        (x.dtype, aligned(x), columns, constants),
        (-(-pairs // _COPIED_ROWS), -(-columns // constants[1]), 1),
        (x, rows, routing.order, routing.blocks, pairs, product.sharing, columns) + constants,
        num_warps=4,
        launch_pdl=pdl,
    )
    return replace(product, x=rows, sharing=0)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """Every pair's token times its routing weight, [T * K, H]: what is rounded to e4m3 when weights go to the input."""
    return (tokens[:, None] * weights[:, :, None]).to(tokens.dtype).flatten(0, 1)


def _by_tensor_memory(x: Tensor, w: Tensor) -> bool:
    """Whether tiles come by the tensor memory accelerator: rows of 16-byte multiples, of a type that it swizzles."""
    taken = interpreting() or (dependent_launch(x.device) and w.element_size() < 4)
    return taken and not (w.shape[2] * w.element_size() | w.data_ptr() | x.data_ptr()) % 16


def _runs_specialised(shape: Shape, product: _Product) -> bool:
    """Whether `wide_gemm` takes the product."""
    by_expert = product.scale is None or product.scale.dim() == 1
    plain = product.sharing == 0 and product.act in ("silu", "none") and not product.weight_in and by_expert
    hopper = ROLES and asynchronous_products(product.x.device)
    return shape.specialised and plain and hopper and _by_tensor_memory(product.x, product.weight)


def _run_specialised(shape: Shape, bt: int, product: _Product, routing: Routing) -> None:
    x, w, out = product.x, product.weight, product.out
    rows, columns, pairs = out.shape[-1], w.shape[2], routing.order.shape[0]
    device, pdl = x.device, dependent_launch(x.device)
    constants = (
        (product.act == "silu", product.by_pair, product.scale is not None, product.factor is not None)
        + (product.quant_how == "divide", product.quant_how == "multiply")
        + (shape.bn, bt, shape.bk, shape.stages, shape.group, shape.short, shape.halves, pdl)
    )
    others = [routing.order if other is None else other for other in (product.scale, product.factor, product.quant)]
    _wide(
        device,
        (x.dtype, out.dtype, columns, rows, shape.warps, constants, aligned(out, *others)),
        (min(most_blocks(pairs, routing.local, bt) * -(-rows // shape.bn), multiprocessors(device)), 1, 1),
        (swizzled_tiles(x, bt, shape.bk), swizzled_tiles(w.view(-1, columns), shape.bn, shape.bk), out)
        + (routing.order, routing.blocks, *others, columns, rows, *constants),
        num_warps=shape.warps,
        launch_pdl=pdl,
    )


def _turns_codes(tokens: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether `wide_float8` takes both products of e4m3 weights whose scales are their own."""
    hopper = ROLES and asynchronous_products(tokens.device)
    odd = (first.shape[2] | second.shape[2] | first.data_ptr() | second.data_ptr()) % 16
    return hopper and tokens.dtype == torch.bfloat16 and not odd


def _run_float8(shape: Shape, bt: int, product: _Product, routing: Routing) -> None:
    x, w, out, scale = product.x, product.weight, product.out, product.scale
    assert scale is not None
    rows, columns, pairs = out.shape[-1], w.shape[2], routing.order.shape[0]
    device, pdl = x.device, dependent_launch(x.device)
    constants = (
        (product.act == "silu", product.by_pair, scale.dim() == 3, shape.bn, bt, shape.bk, shape.stages)
        + (shape.group, shape.short, shape.halves, pdl)
    )  # fmt: skip
    _wide_float8(
        device,
        (x.dtype, out.dtype, columns, rows, shape.warps, constants, aligned(out, scale)),
        (min(most_blocks(pairs, routing.local, bt) * -(-rows // shape.bn), multiprocessors(device)), 1, 1),
        (swizzled_tiles(x, bt, shape.bk), swizzled_tiles(w.view(-1, columns), shape.bn, shape.bk), out)
        + (routing.order, routing.blocks, scale, columns, rows, *constants),
        num_warps=shape.warps,
        launch_pdl=pdl,
    )


def _run(shape: Shape, bt: int, product: _Product, routing: Routing) -> None:
    if shape.specialised and product.x.dtype != product.weight.dtype:
        return _run_float8(shape, bt, product, routing)
    if _runs_specialised(shape, product):
        return _run_specialised(shape, bt, product, routing)
    x, w, out = product.x, product.weight, product.out
    rows, columns, pairs = out.shape[-1], w.shape[2], routing.order.shape[0]
    device, pdl = x.device, dependent_launch(x.device)
    tma = _by_tensor_memory(x, w)
    even = columns % (shape.bk * shape.splits) == 0
    scaled = "" if product.scale is None else ("", "expert", "channel", "block")[product.scale.dim()]
    constants = (
        (product.sharing > 0, product.by_pair, product.act, scaled, product.factor is not None, product.quant_how)
        + (product.weight_in, shape.bn, bt, shape.bk, shape.splits, shape.group, shape.tokens_left, tma, even)
        + (shape.stages, interpreting(), pdl)
    )  # fmt: skip
    absent = routing.order  # stands for an argument that the kernel does not read
    others = [absent if other is None else other for other in (product.scale, product.factor, product.quant)]
    key = (x.dtype, w.dtype, out.dtype, routing.weights.dtype, columns, rows, shape.warps, constants)
    bound = most_blocks(pairs, routing.local, bt) * -(-rows // shape.bn) * shape.splits
    left = matrix_tiles(w.view(-1, columns), shape.bn, shape.bk) if tma else w
    right = matrix_tiles(x, bt, shape.bk) if tma and not product.sharing else x
    _gemm(
        device,
        (*key, aligned(x, w, out, *others, routing.weights)),
        (min(bound, shape.per_sm * multiprocessors(device)), 1, 1),
        (right, left, out, routing.order, routing.blocks, *others, routing.weights)
        + (pairs, product.sharing, columns, rows, x.shape[1])
        + constants,
        num_warps=shape.warps,
        launch_pdl=pdl,
    )
