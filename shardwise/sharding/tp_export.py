"""Exports a plan as a Transformers `tp_plan` dictionary: module globs to styles.

A style says less than a plan: no uneven heads, no shared KV heads, no parts of fused projections. Those are refused.
"""

import re

from shardwise.sharding.axes import Axis
from shardwise.sharding.cuts import CutKind
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorPattern

CLOSING = ("o", "o_b", "down", "out_proj")
"""Roles of matrices that contract over the cut axis."""
_WEIGHT = re.compile(r"(_?weight|\.weight|_blocks|_scales)$")


def export_tp_plan(plan: Plan) -> dict[str, str]:
    """Module globs of the whole model to styles, in model order. ValueError for cuts that have no style."""
    styles: dict[str, str] = {}
    for pattern in plan.loaded:
        if len(pattern.spec.shape) < 2 or not pattern.spec.values:
            continue
        style = _style(plan, pattern)
        if style:
            module = pattern.spec.name.replace("{layer}", "*").replace("{expert}", "*")
            styles[_WEIGHT.sub("", module)] = style
    return styles


def _style(plan: Plan, pattern: TensorPattern) -> str:
    spec, cuts = pattern.spec, plan.cuts.by_axis
    for axis in (a for dim in spec.dims for a in dim.axes):
        if cuts[axis].kind in (CutKind.UNEVEN, CutKind.REPLICATE, CutKind.PAD):
            raise ValueError(
                f"{spec.name}: {axis.units} {axis.axis} on {cuts[axis].parts} ranks are cut {cuts[axis].kind}, which "
                "no tp_plan style can say; export a layout that cuts evenly (shardwise plan --legal lists them)"
            )
    cut = [i for i, dim in enumerate(spec.dims) if any(cuts[a].parts > 1 for a in dim.axes)]
    if not cut:
        return ""
    dim = spec.dims[cut[0]]
    if dim.axes[0].axis is Axis.VOCAB:
        return "embedding_rowwise" if spec.role.startswith("embed") else "colwise_gather_output"
    if dim.axes[0].axis is Axis.EXPERTS:
        return "grouped_gemm"
    if spec.role.split(".")[-2] in CLOSING:
        return "rowwise"
    if len(dim.segments) == 1:
        return "colwise"
    if {s.axis for s in dim.segments} == {dim.axes[0]}:
        return "packed_colwise"
    raise ValueError(f"{spec.name}: parts of different axes in one projection are cut, which no tp_plan style can say")
