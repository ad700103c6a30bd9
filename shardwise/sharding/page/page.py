"""Assembly of the page: figures, memory bars, the map of holdings, collectives, warnings and the search."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from shardwise.sharding.axes import merge
from shardwise.sharding.capacity import most_sequences
from shardwise.sharding.cost import Estimate, Workload, collective_seconds
from shardwise.sharding.page.svg import Bar, MapRow, Point, holding_map, scatter, stacked_bars
from shardwise.sharding.plan import Plan
from shardwise.sharding.search import SearchResult
from shardwise.sharding.shards import TensorPattern
from shardwise.sharding.topology import Topology

GIB = 2**30
MOST_ROWS = 48


def page(
    plan: Plan, topology: Topology, workload: Workload, estimate: Estimate, found: SearchResult | None = None
) -> str:
    """HTML text of one plan on one machine, with the chart of a search where there was one."""
    title = f"{plan.model.name}: {plan.layout}"
    sections = [
        f"<h1>{escape(plan.model.name)}</h1>",
        f"<p class='lead'>{escape(plan.model.architecture)} · {escape(str(plan.layout))} on "
        f"{escape(topology.device.name)} · {workload.batch} × {workload.context} tokens</p>",
        _cards(plan, topology, workload, estimate),
        _memory(plan, topology, estimate, workload),
        _map(plan),
        _collectives(plan, topology, workload),
        _warnings(plan.warnings),
        _search(found) if found else "",
    ]
    style = (Path(__file__).parent / "report.css").read_text()
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _cards(plan: Plan, topology: Topology, workload: Workload, estimate: Estimate) -> str:
    heaviest = max(r.weight_bytes for r in plan.ranks)
    lightest = min(r.weight_bytes for r in plan.ranks)
    figures = [
        (f"{plan.parameters / 1e9:.3f} B", "parameters"),
        (f"{heaviest / GIB:.2f} GiB", "weights on the fullest rank"),
        (f"{heaviest / lightest - 1:.1%}", "imbalance of weights"),
        (f"{estimate.decode.total * 1e3:.2f} ms", f"predicted decode step ({estimate.decode.bound})"),
        (f"{estimate.prefill.total * 1e3:.0f} ms", f"predicted prefill ({estimate.prefill.bound})"),
        (f"{max(r.kv_bytes_per_token for r in plan.ranks) / 1024:.1f} KiB", "cache a token and rank"),
        (str(most_sequences(plan, topology, workload)), f"sequences of {workload.context} tokens fit"),
    ]
    cards = "".join(
        f"<div class='card'><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures
    )
    return f"<div class='cards'>{cards}</div>"


def _memory(plan: Plan, topology: Topology, estimate: Estimate, workload: Workload) -> str:
    device = topology.device.memory_bytes
    sequences = -(-workload.batch // plan.layout.attn_dp)
    needs = []
    for totals in plan.ranks:
        cache = plan.cache_bytes(totals.rank, max(workload.context, workload.prompt), sequences)
        needs.append((totals.rank, totals.weight_bytes, cache, estimate.memory.workspace))
    full = max(device, *(sum(n[1:]) for n in needs))
    bars = [_memory_bar(rank, weights, cache, work, device) for rank, weights, cache, work in needs]
    legend = _legend(
        ("weights", "weights"), ("cache", "KV and state cache"), ("workspace", "activations"), ("free", "free")
    )
    return f"<h2>Memory of each rank</h2>{legend}{_scroll(stacked_bars(bars, full, 'memory of each rank'))}"


def _memory_bar(rank: int, weights: int, cache: int, work: int, device: int) -> Bar:
    left = device - weights - cache - work
    named = (("weights", weights), ("cache", cache), ("workspace", work), ("free", max(left, 0)))
    parts = tuple((kind, value, f"{kind}: {value / GIB:.2f} GiB") for kind, value in named)
    note = f"{left / GIB:.1f} GiB free" if left >= 0 else f"{-left / GIB:.1f} GiB too much"
    return Bar(f"rank {rank}", parts, note)


def _map(plan: Plan) -> str:
    patterns = [p for p in plan.loaded if any(d.axes for d in p.spec.dims) or p.spec.experts]
    rows = [_map_row(plan, p) for p in patterns[:MOST_ROWS]]
    if not rows:
        return ""
    hidden = len(patterns) - len(rows)
    more = (
        f"<p class='note'>{hidden} more patterns are in the table of <code>shardwise plan</code>.</p>" if hidden else ""
    )
    legend = _legend(
        ("weights", "held, at its place in the tensor"), ("free", "on other ranks"), ("copy", "whole copy")
    )
    return (
        "<h2>Which rank holds what</h2>"
        "<p class='note'>Columns are ranks; tensors held whole by every rank are left out.</p>"
        f"{legend}{_scroll(holding_map(rows, 'which rank holds what'))}{more}"
    )


def _map_row(plan: Plan, pattern: TensorPattern) -> MapRow:
    spec = pattern.spec
    label = spec.role + (f" × {len(pattern.layers)} layers" if pattern.layers else "")
    dims = [i for i, d in enumerate(spec.dims) if d.axes]  # of stacked experts the expert dim comes first
    lengths = [spec.shape[i] for i in dims]
    shares = []
    for rank in range(plan.layout.world):
        shard = plan.pattern_shard(pattern, rank)
        parts, whole = [shard.ranges[i] for i in dims], shard.whole
        if spec.experts:
            held = merge((e, e + 1) for e in plan.experts(rank, spec.experts))
            parts, whole = [held, *parts], whole and held == ((0, spec.experts.units),)
        shares.append(None if whole else (parts[0], parts[1] if len(parts) > 1 else ((0, 1),)))
    lengths = [spec.experts.units, *lengths] if spec.experts else lengths
    return MapRow(label, spec.name, tuple(shares), (lengths[0], lengths[1] if len(lengths) > 1 else 1))


def _collectives(plan: Plan, topology: Topology, workload: Workload) -> str:
    tokens = -(-workload.batch // plan.layout.attn_dp)
    rows = [
        (
            c.where,
            c.op,
            c.axis,
            f"{c.bytes_per_token:,}",
            str(c.count),
            f"{collective_seconds(c, plan, topology, tokens) * 1e6:.1f}",
        )
        for c in plan.collectives
    ]
    if not rows:
        return "<h2>Communication</h2><p class='note'>None: one rank.</p>"
    head = ("where", "operation", "axis", "bytes a token", "times a step", "µs each when decoding")
    return f"<h2>Communication</h2>{_table(head, rows, numeric=3)}"


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(w)}</li>" for w in warnings)
    return f"<h2>To know</h2><ul class='warnings'>{items}</ul>" if items else ""


def _search(found: SearchResult) -> str:
    points = [
        Point(
            (c.estimate.memory.weights + c.estimate.memory.cache) / GIB,
            c.estimate.decode.total * 1e3,
            str(c.layout),
            "weights" if c.estimate.memory.fits else "bad",
        )
        for c in found.ranked
    ]
    rows = [
        (
            str(c.layout),
            "yes" if c.estimate.memory.fits else "no",
            f"{c.estimate.memory.weights / GIB:.2f}",
            f"{c.estimate.decode.total * 1e3:.2f}",
            f"{c.tokens_per_second:,.0f}",
            c.estimate.decode.bound,
        )
        for c in found.ranked
    ]
    head = ("layout", "fits", "weights GiB", "decode ms", "tokens/s", "bound")
    refused = "".join(f"<li>{escape(str(r.layout))}: {escape('; '.join(r.reasons))}</li>" for r in found.refused)
    return (
        "<h2>Every layout</h2>"
        + _legend(("weights", "fits"), ("bad", "does not fit"))
        + _scroll(scatter(points, "weights and cache, GiB a rank", "decode step, ms", "search over layouts"))
        + _table(head, rows, numeric=2)
        + (f"<h2>Refused</h2><ul class='warnings'>{refused}</ul>" if refused else "")
    )


def _legend(*entries: tuple[str, str]) -> str:
    marks = "".join(f"<span><i style='background:var(--{kind})'></i>{escape(name)}</span>" for kind, name in entries)
    return f"<div class='legend'>{marks}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int) -> str:
    """A table whose columns from `numeric` on are right-aligned."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i >= numeric else ''}>{escape(c)}</{tag}>" for i, c in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return _scroll(f"<table><tr>{cells(head, 'th')}</tr>{body}</table>")


def _scroll(content: str) -> str:
    return f"<div class='scroll'>{content}</div>"
