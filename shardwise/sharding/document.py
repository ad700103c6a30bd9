"""A plan as a JSON document: versioned, stably ordered, with a hash over config, tensors and layout."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shardwise.sharding.names import expand
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorShard

if TYPE_CHECKING:
    from shardwise.sharding.cost import Estimate, Workload
    from shardwise.sharding.topology import Topology

    Cost = tuple[Topology, Workload, Estimate]

SCHEMA_VERSION = 1


def document(plan: Plan, *, per_tensor: bool = False) -> dict[str, Any]:
    """The plan as JSON values. Tensors are patterns with a count; `per_tensor` lists every tensor on its own."""
    ranks = [{**_totals(plan, r), "tensors": list(_tensors(plan, r, per_tensor))} for r in range(plan.layout.world)]
    return {**_head(plan, None), "ranks": ranks}


def document_lines(
    plan: Plan, *, per_tensor: bool = False, cost: "Cost | None" = None, workload: "Workload | None" = None
) -> Iterator[str]:
    """The text of `document`, line by line: one field, rank or tensor a line, never all tensors in memory at once.

    `cost`: (topology, workload, estimate) of `cost.estimate`, which then has its own field. `workload`: what every
    rank's `cache_bytes` are for, which are left out without it.
    """
    yield "{"
    for key, value in _head(plan, cost).items():
        yield f' "{key}": {json.dumps(value)},'
    yield ' "ranks": ['
    for rank in range(plan.layout.world):
        yield "  {"
        for key, value in (_totals(plan, rank) | _cached(plan, workload, rank)).items():
            yield f'   "{key}": {json.dumps(value)},'
        yield '   "tensors": ['
        yield from _separated(_tensors(plan, rank, per_tensor))
        yield "   ]"
        yield "  }" if rank == plan.layout.world - 1 else "  },"
    yield " ]"
    yield "}"


def _separated(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    previous = None
    for row in rows:
        if previous is not None:
            yield f"    {previous},"
        previous = json.dumps(row)
    if previous is not None:
        yield f"    {previous}"


def _head(plan: Plan, cost: "Cost | None") -> dict[str, Any]:
    layout = plan.layout
    head = {
        "schema_version": SCHEMA_VERSION,
        "hash": plan_hash(plan),
        "model": {
            "name": plan.model.name,
            "architecture": plan.model.architecture,
            "parameters": plan.parameters,
            "quantization": plan.model.quantization,
            "layers": len(plan.model.layers),
            "config_hash": plan.model.fingerprint,
        },
        "layout": {
            "world": layout.world,
            "tp": layout.tp,
            "moe_tp": layout.moe_tp,
            "moe_ep": layout.moe_ep,
            "attn_dp": layout.attn_dp,
        },
        "options": {
            "pad": list(plan.pad),
            "extras": list(dict.fromkeys(p.part for p in plan.loaded if p.part != "text")),
            "kv_itemsize": plan.kv_itemsize,
        },
        "cuts": [
            {"axis": str(a.axis), "units": a.units, "groups": a.groups, "kind": str(c.kind), "grain": c.grain}
            for a, c in plan.cuts.by_axis.items()
        ],
        "imbalance": plan.imbalance,
        "extras": extras(plan),
        "collectives": [asdict(c) for c in plan.collectives],
        "warnings": list(plan.warnings),
    }
    if cost is not None:
        head["cost"] = _cost(plan, *cost)
    return head


def _cost(plan: Plan, topology: "Topology", workload: "Workload", estimate: "Estimate") -> dict[str, Any]:
    from shardwise.sharding.capacity import most_sequences

    steps = {"decode": estimate.decode, "prefill": estimate.prefill}
    return {
        "device": topology.device.name,
        "nodes": topology.nodes,
        "workload": asdict(workload),
        "memory": {**asdict(estimate.memory), "left": estimate.memory.left, "fits": estimate.memory.fits},
        "most_sequences": most_sequences(plan, topology, workload),
        **{name: {**asdict(t), "total": t.total, "bound": t.bound} for name, t in steps.items()},
    }


def extras(plan: Plan) -> list[dict[str, Any]]:
    """Parts of the checkpoint that a run does not load, with their bytes; None where only headers tell them."""
    found: dict[str, dict[str, Any]] = {}
    for extra in plan.model.extras:
        size = 0 if extra.tensors else None
        row = found.setdefault(
            extra.name, {"name": extra.name, "parameters": size, "bytes": size, "loaded": False, "note": ""}
        )
        row["note"] = row["note"] or extra.note
    for pattern in plan.patterns:
        if pattern.part in found:
            row = found[pattern.part]
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


def _totals(plan: Plan, rank: int) -> dict[str, Any]:
    totals = plan.ranks[rank]
    return {
        "rank": rank,
        "coordinates": totals.coordinates._asdict(),
        "weight_bytes": totals.weight_bytes,
        "parameters": totals.parameters,
        "kv_bytes_per_token": totals.kv_bytes_per_token,
        "state_bytes_per_sequence": totals.state_bytes_per_sequence,
        "experts": [list(plan.experts(rank, axis)) for axis in plan.cuts.placement],
    }


def _cached(plan: Plan, workload: "Workload | None", rank: int) -> dict[str, int]:
    if workload is None:
        return {}
    from shardwise.sharding.cost import cached_bytes

    return {"cache_bytes": cached_bytes(plan, workload, rank)}


def _tensors(plan: Plan, rank: int, per_tensor: bool) -> Iterator[dict[str, Any]]:
    at = plan.layout.coordinates(rank)
    for pattern in plan.loaded:
        row = _row(plan.pattern_shard(pattern, rank), plan.pattern_count(pattern, rank))
        if not per_tensor:
            yield row
            continue
        held = plan.cuts.placement[pattern.spec.experts][at.moe_ep] if pattern.spec.experts else None
        each = row["bytes"] // row["count"] if row["count"] else 0
        for name, expert in expand(pattern):
            if held is None or expert in held:
                yield row | {"pattern": name, "count": 1, "bytes": each}


def _row(shard: TensorShard, count: int) -> dict[str, Any]:
    return {
        "pattern": shard.name,
        "count": count,
        "global_shape": shard.global_shape,
        "local_shape": shard.local_shape,
        "ranges": shard.ranges,
        "dtype": shard.dtype,
        "bytes": shard.nbytes * count,
    }
