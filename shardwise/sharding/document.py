"""A plan as a JSON document: versioned, stably ordered, with a hash over config, tensors and layout."""

import hashlib
import json
from typing import Any

from shardwise.sharding.names import expand
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorPattern, TensorShard

SCHEMA_VERSION = 1


def document(plan: Plan, *, per_tensor: bool = False) -> dict[str, Any]:
    """The plan as JSON values. Tensors are patterns with a count; `per_tensor` lists every tensor on its own."""
    layout = plan.layout
    return {
        "schema_version": SCHEMA_VERSION,
        "hash": plan_hash(plan),
        "model": {
            "name": plan.model.name,
            "architecture": plan.model.architecture,
            "parameters": plan.parameters,
            "quantization": plan.model.quantization,
            "layers": len(plan.model.layers),
        },
        "layout": {
            "world": layout.world,
            "tp": layout.tp,
            "moe_tp": layout.moe_tp,
            "moe_ep": layout.moe_ep,
            "attn_dp": layout.attn_dp,
        },
        "cuts": [
            {"axis": str(a.axis), "units": a.units, "groups": a.groups, "kind": str(c.kind), "grain": c.grain}
            for a, c in plan.cuts.by_axis.items()
        ],
        "ranks": [_rank(plan, r, per_tensor) for r in range(layout.world)],
        "extras": extras(plan),
        "collectives": [
            {"where": c.where, "op": c.op, "axis": c.axis, "bytes_per_token": c.bytes_per_token, "count": c.count}
            for c in plan.collectives
        ],
        "warnings": list(plan.warnings),
    }


def extras(plan: Plan) -> list[dict[str, Any]]:
    """Parts of the checkpoint that a run does not load, with their bytes."""
    found: dict[str, dict[str, Any]] = {}
    notes = {e.name: e.note for e in plan.model.extras}
    for pattern in plan.patterns:
        if pattern.part not in notes:
            continue
        row = found.setdefault(
            pattern.part,
            {"name": pattern.part, "parameters": 0, "bytes": 0, "loaded": False, "note": notes[pattern.part]},
        )
        row["parameters"] += pattern.count * pattern.spec.parameters
        row["bytes"] += pattern.count * pattern.spec.nbytes
        row["loaded"] |= pattern.loaded
    return list(found.values())


def plan_hash(plan: Plan) -> str:
    """`sha256:` over the config, every tensor pattern as stored, and the layout with its cuts and expert placement."""
    content = {
        "config": plan.model.fingerprint,
        "tensors": sorted(
            [p.spec.name, p.spec.dtype, p.spec.shape, p.layers, p.spec.experts.units if p.spec.experts else 0]
            for p in plan.loaded
        ),
        "layout": str(plan.layout),
        "cuts": sorted(
            [str(a.axis), a.units, a.groups, c.parts, c.grain, c.padded] for a, c in plan.cuts.by_axis.items()
        ),
        "experts": [placement for placement in plan.cuts.placement.values()],
    }
    text = json.dumps(content, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _rank(plan: Plan, rank: int, per_tensor: bool) -> dict[str, Any]:
    totals = plan.ranks[rank]
    at = totals.coordinates
    return {
        "rank": rank,
        "coordinates": {"tp": at.tp, "attn_dp": at.attn_dp, "moe_tp": at.moe_tp, "moe_ep": at.moe_ep},
        "weight_bytes": totals.weight_bytes,
        "parameters": totals.parameters,
        "kv_bytes_per_token": totals.kv_bytes_per_token,
        "state_bytes_per_sequence": totals.state_bytes_per_sequence,
        "experts": [list(plan.experts(rank, axis)) for axis in plan.cuts.placement],
        "tensors": [t for p in plan.loaded for t in _tensors(plan, p, rank, per_tensor)],
    }


def _tensors(plan: Plan, pattern: TensorPattern, rank: int, per_tensor: bool) -> list[dict[str, Any]]:
    if not per_tensor:
        shard = plan.pattern_shard(pattern, rank)
        return [_row(shard, plan.pattern_count(pattern, rank))]
    shards = (plan.shard(rank, name) for name, _ in expand(pattern))
    return [_row(s, 1) for s in shards if s.held]


def _row(shard: TensorShard, count: int) -> dict[str, Any]:
    return {
        "pattern": shard.name,
        "count": count,
        "global_shape": list(shard.global_shape),
        "local_shape": list(shard.local_shape),
        "ranges": [[list(r) for r in dim] for dim in shard.ranges],
        "dtype": shard.dtype,
        "bytes": shard.nbytes * count,
    }
