"""Exports a plan as a Transformers `tp_plan` dictionary: module globs to styles, in the names of its version 5.

A style says less than a plan: no uneven heads, no shared KV heads, no parts of fused projections. Those are refused.
Transformers 5 holds a layer's experts as one module, gate and up in one tensor, however a checkpoint stores them.
"""

import re
from collections.abc import Iterator

from shardwise.sharding.axes import Axis
from shardwise.sharding.cuts import CutKind
from shardwise.sharding.plan import Plan
from shardwise.sharding.spec import Moe
from shardwise.sharding.tensors import TensorSpec

CLOSING = ("o", "o_b", "down", "out_proj")
"""Roles of matrices that contract over the cut axis."""
_WEIGHT = re.compile(r"\.weight$")


def export_tp_plan(plan: Plan) -> dict[str, str]:
    """Module globs of the whole model to styles, in model order. ValueError for what has no style."""
    if plan.layout.attn_dp > 1:
        raise ValueError(f"attn_dp {plan.layout.attn_dp}: no tp_plan style says it; export a layout without it")
    moes = [f for layer, _ in plan.model.layer_groups() for f in layer.feed_forward if isinstance(f, Moe)]
    routed = {tensor: moe for moe in moes for tensor in moe.tensors if _is_routed(tensor)}
    styles: dict[str, str] = {}
    for pattern in plan.loaded:
        if len(pattern.spec.shape) < 2 or not pattern.spec.values:
            continue
        if pattern.spec in routed:
            styles |= _experts(plan, pattern.spec, routed[pattern.spec])
        elif style := _style(plan, pattern.spec):
            styles[_WEIGHT.sub("", _glob(pattern.spec.name))] = style
    return styles


def _is_routed(spec: TensorSpec) -> bool:
    return spec.experts is not None or any(a.axis is Axis.EXPERTS for dim in spec.dims for a in dim.axes)


def _glob(name: str) -> str:
    """The name of a tensor's module in Transformers 5, which calls every feed-forward of a decoder `mlp`."""
    return name.replace("{layer}", "*").replace("{expert}", "*").replace(".block_sparse_moe.", ".mlp.")


def _experts(plan: Plan, spec: TensorSpec, moe: Moe) -> dict[str, str]:
    """Entries for one tensor of a layer's experts, and for the module that holds them."""
    layout, axis = plan.layout, moe.expert_axis
    if layout.moe_ep > 1 and layout.moe_tp > 1:
        raise ValueError(
            f"{spec.name}: experts are dealt to {layout.moe_ep} ranks and each is cut in {layout.moe_tp}, which no "
            "tp_plan style can say; export a layout with ep 1 or moe-tp 1"
        )
    if layout.world == 1:
        return {}
    for cut in (axis, moe.mlp_axis):
        _refuse_kind(spec, plan.cuts.by_axis[cut].kind, f"{cut.units} {cut.axis}", plan.cuts.by_axis[cut].parts)
    if sum(map(len, plan.cuts.placement[axis])) > axis.units:
        raise ValueError(f"{spec.name}: redundant experts have no tp_plan style; export a layout without them")
    holder = _glob(spec.name).split(".experts.")[0] + ".experts"
    if layout.moe_ep > 1:
        return {f"{holder}.{part}": "grouped_gemm" for part in _parts(spec, moe)} | {holder: "ep_dispatch_experts"}
    if moe.gate_up_interleaved:
        raise ValueError(
            f"{spec.name}: gate and up rows lie in turn, whose parts have no style; export a layout with ep"
        )
    opening, closing = ("packed_rowwise", "colwise") if moe.transposed else ("packed_colwise", "rowwise")
    opening = opening if moe.gated else opening.removeprefix("packed_")
    style = closing if _closes(spec) else opening
    return {f"{holder}.{part}": style for part in _parts(spec, moe)} | {holder: "moe_tp_experts"}


def _parts(spec: TensorSpec, moe: Moe) -> Iterator[str]:
    name = "down_proj" if _closes(spec) else "gate_up_proj" if moe.gated else "up_proj"
    yield f"{name}_bias" if spec.role.endswith(".bias") else name


def _closes(spec: TensorSpec) -> bool:
    return spec.role.split(".")[-2] in CLOSING


def _style(plan: Plan, spec: TensorSpec) -> str:
    cuts = plan.cuts.by_axis
    for axis in (a for dim in spec.dims for a in dim.axes):
        _refuse_kind(spec, cuts[axis].kind, f"{axis.units} {axis.axis}", cuts[axis].parts)
    cut = [i for i, dim in enumerate(spec.dims) if any(cuts[a].parts > 1 for a in dim.axes)]
    if not cut:
        return ""
    dim = spec.dims[cut[0]]
    if dim.axes[0].axis is Axis.VOCAB:
        return "embedding_rowwise" if spec.role.startswith("embed") else "colwise_gather_output"
    if _closes(spec):
        return "rowwise"
    if len(dim.segments) == 1:
        return "colwise"
    if {s.axis for s in dim.segments} == {dim.axes[0]}:
        return "packed_colwise"
    raise ValueError(
        f"{spec.name}: parts of different axes in one projection are cut, which no tp_plan style can say; "
        "take the plan itself (--json)"
    )


def _refuse_kind(spec: TensorSpec, kind: CutKind, units: str, parts: int) -> None:
    if kind in (CutKind.UNEVEN, CutKind.REPLICATE, CutKind.PAD):
        raise ValueError(
            f"{spec.name}: {units} on {parts} ranks are cut {kind}, which no tp_plan style can say; export a layout "
            "that cuts evenly (shardwise plan --legal lists them)"
        )
