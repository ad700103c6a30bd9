"""A plan as text for people: tensors and their cuts, ranks and their bytes, collectives, warnings."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from shardwise.sharding.document import extras
from shardwise.sharding.plan import Plan
from shardwise.sharding.shards import TensorPattern

if TYPE_CHECKING:
    from shardwise.sharding.cost import Estimate, Workload
    from shardwise.sharding.document import Cost
    from shardwise.sharding.search import SearchResult
    from shardwise.sharding.topology import Topology

_STEP = ("weights", "cache", "compute", "communication", "launch")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def text_report(plan: Plan, cost: "Cost | None" = None, workload: "Workload | None" = None) -> str:
    """The whole plan, a line for each tensor pattern, rank and collective; with its cost where that is given.

    `workload`: what a column for the cache of each rank is for.
    """
    model, layout = plan.model, plan.layout
    head = (
        f"{model.name}  {model.architecture}  {count_text(plan.parameters)} parameters, {len(model.layers)} layers, "
        f"quantization {model.quantization}\nlayout: {layout}  (world {layout.world})"
    )
    parts = [head, tensor_table(plan), rank_table(plan, workload) + _imbalance(plan)]
    if plan.collectives:
        parts.append(collective_table(plan))
    if cost is not None:
        parts.append(cost_text(plan, *cost))
    asked = cost[1] if cost is not None else workload
    warnings = plan.warnings + (_beyond(plan, asked, cost is not None) if asked is not None else ())
    notes = [_extra_line(row) for row in extras(plan)] + [f"warning: {w}" for w in warnings]
    return "\n\n".join(parts + (["\n".join(notes)] if notes else []))


def _imbalance(plan: Plan) -> str:
    return (
        f"\nimbalance: the fullest rank holds {plan.imbalance:.2%} more than the average"
        if plan.imbalance >= 5e-5  # else it reads 0.00%
        else ""
    )


def _beyond(plan: Plan, workload: "Workload", prompted: bool) -> tuple[str, ...]:
    most = plan.model.max_positions
    wanted = max(workload.context, workload.prompt) if prompted else workload.context
    return (f"{wanted} tokens a sequence are more than the model's {most} positions",) if 0 < most < wanted else ()


def _extra_line(row: dict) -> str:
    state = "loaded" if row["loaded"] else "not loaded"
    known = row["bytes"] is not None
    size = f"{size_text(row['bytes'])}, {count_text(row['parameters'])} parameters" if known else "of unknown size"
    return f"extra, {state}: {row['name']}, {size}" + (f" ({row['note']})" if row["note"] else "")


def cost_text(plan: Plan, topology: "Topology", workload: "Workload", estimate: "Estimate") -> str:
    """Memory of the fullest rank and the predicted steps with what they are made of."""
    from shardwise.sharding.capacity import most_sequences

    memory = estimate.memory
    rows = [(name, size_text(getattr(memory, name))) for name in ("weights", "cache", "workspace")]
    rows.append(("left" if memory.fits else "too much", size_text(abs(memory.left))))
    rows.append(("room for", f"{most_sequences(plan, topology, workload)} sequences of {workload.context} tokens"))
    of = f"fullest rank on {topology.device.name} ({size_text(memory.device)})"
    steps = [
        (name, *(f"{1e3 * getattr(t, part):.3f}" for part in _STEP), f"{1e3 * t.total:.3f}", t.bound)
        for name, t in (
            (f"decode, {workload.batch} x {workload.context} tokens cached", estimate.decode),
            (f"prefill, {workload.batch} x {workload.prompt} tokens", estimate.prefill),
        )
    ]
    where = (
        f"predicted ms, {topology.nodes} nodes of {topology.ranks_per_node}" if topology.nodes > 1 else "predicted ms"
    )
    return table((of, "bytes"), rows) + "\n\n" + table((where, *_STEP, "step", "bound by"), steps)


def search_rows(found: "SearchResult") -> dict:
    """A search as JSON values."""
    return {
        "model": found.model.name,
        "device": found.topology.device.name,
        "devices": found.devices,
        "workload": asdict(found.workload),
        "objective": found.objective,
        "ranked": [
            {
                "layout": str(c.layout),
                "world": c.layout.world,
                "tp": c.layout.tp,
                "attn_dp": c.layout.attn_dp,
                "moe_tp": c.layout.moe_tp,
                "moe_ep": c.layout.moe_ep,
                "replicas": c.replicas,
                "fits": c.estimate.memory.fits,
                "bytes_left": c.estimate.memory.left,
                "decode_seconds": c.estimate.decode.total,
                "prefill_seconds": c.estimate.prefill.total,
                "tokens_per_second": c.tokens_per_second,
                "bound": c.estimate.decode.bound,
            }
            for c in found.ranked
        ],
        "refused": [{"layout": str(r.layout), "reasons": list(r.reasons)} for r in found.refused],
    }


def search_report(found: "SearchResult") -> str:
    """What was asked, layouts best first, then those that are refused, each with its reason."""
    work, device = found.workload, found.topology.device
    asked = (
        f"{found.model.name} on {found.devices} x {device.name} ({size_text(device.memory_bytes)}), "
        f"by {found.objective}: each replica serves {work.batch} x {work.context} tokens, prompts of {work.prompt}"
    )
    rows = [
        (
            str(i),
            str(c.layout),
            str(c.replicas),
            size_text(c.estimate.memory.weights),
            ("" if c.estimate.memory.fits else "-") + size_text(abs(c.estimate.memory.left)),
            f"{1e3 * c.estimate.decode.total:.3f}",
            f"{1e3 * c.estimate.prefill.total:.1f}",
            f"{c.tokens_per_second:.0f}",
            c.estimate.decode.bound if c.estimate.memory.fits else "memory: does not fit",
        )
        for i, c in enumerate(found.ranked, 1)
    ]
    head = ("", "layout", "replicas", "weights", "left", "decode ms", "prefill ms", "tokens/s", "bound by")
    refused = "\n".join(f"refused: {r.layout}: {'; '.join(r.reasons)}" for r in found.refused)
    return f"{asked}\n\n{table(head, rows)}" + (f"\n\n{refused}" if refused else "")


def tensor_table(plan: Plan) -> str:
    """One line a pattern: how often, global and first rank's shape, type, bytes on the fullest rank."""
    rows = [_tensor_row(plan, p) for p in plan.loaded]
    return table(("tensor", "count", "global", "cut", "local (rank 0)", "type", "bytes (rank 0)"), rows)


def rank_table(plan: Plan, workload: "Workload | None" = None) -> str:
    """One line a rank; ranks that hold the same amounts share a line. With the cache of the workload, if any."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for r in plan.ranks:
        key = (r.weight_bytes, r.kv_bytes_per_token, r.state_bytes_per_sequence, r.tensors)
        groups.setdefault(key, []).append(r.rank)
    head = ["rank", "weights", "tensors", "KV cache a token", "state a sequence"]
    rows = [
        [_ranks(ranks), size_text(weights), str(tensors), bytes_text(kv), size_text(state) if state else "-"]
        for (weights, kv, state, tensors), ranks in groups.items()
    ]
    if workload is not None:
        from shardwise.sharding.cost import cached_bytes, sequences_of

        head.append(f"cache, {sequences_of(plan, workload)} x {workload.context} tokens")
        for row, (first, *_) in zip(rows, groups.values(), strict=True):
            row.append(size_text(cached_bytes(plan, workload, first)))
    return table(head, rows)


def collective_table(plan: Plan) -> str:
    rows = [(c.where, c.op, c.axis, str(c.count), bytes_text(c.bytes_per_token)) for c in plan.collectives]
    return table(("collective after", "operation", "over", "a step", "payload a token"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two spaces between them."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def size_text(nbytes: int) -> str:
    """Bytes with a binary unit, three digits."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if not unit else f"{value:.3f} {_UNITS[unit]}"


def bytes_text(nbytes: int) -> str:
    """What a token takes: small, and multiplied by many, so exact."""
    return f"{nbytes} B"


def count_text(n: int) -> str:
    """A count with M, B or T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= limit:
            return f"{n / limit:.3f} {unit}"
    return str(n)


def _tensor_row(plan: Plan, pattern: TensorPattern) -> tuple[str, ...]:
    shard, local = plan.pattern_shard(pattern, 0), plan.pattern_count(pattern, 0)
    shape = " x ".join(map(str, shard.global_shape)) or "scalar"
    mine = " x ".join(map(str, shard.local_shape)) or "scalar"
    return (
        pattern.spec.name,
        str(pattern.count),
        shape,
        cut_text(plan, pattern),
        mine if local == pattern.count else f"{local} of {mine}",
        shard.dtype,
        size_text(shard.nbytes * local),
    )


def cut_text(plan: Plan, pattern: TensorPattern) -> str:
    """How a pattern is cut: `dim 0 q_heads (uneven)`, `experts (even)`, or `replicated`."""
    cuts = plan.cuts.by_axis
    found = [
        f"{a.axis} ({cuts[a].kind})"
        for a in ([pattern.spec.experts] if pattern.spec.experts else [])
        if cuts[a].parts > 1
    ]
    for i, dim in enumerate(pattern.spec.dims):
        found += [f"dim {i} {a.axis} ({cuts[a].kind})" for a in dim.axes if cuts[a].parts > 1]
    if found:
        return ", ".join(found)
    return "replicated" if plan.layout.world > 1 else "whole"


def _ranks(ranks: list[int]) -> str:
    spans: list[list[int]] = []
    for r in ranks:
        if spans and r == spans[-1][1] + 1:
            spans[-1][1] = r
        else:
            spans.append([r, r])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
