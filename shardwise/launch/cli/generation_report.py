"""What `bench generate` measured, summed up over the ranks and as a table."""

from collections.abc import Iterable
from typing import Any

GB, MB, MS = 1e9, 1e6, 1e-3


def summary(ranks: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Rank 0's run with the median decode rate, and how it compares with what the slowest rank's memory allows."""
    first = ranks[0]
    runs = sorted(first["runs"], key=lambda run: run["decode_tokens_per_second"])
    typical = runs[(len(runs) - 1) // 2]
    step_limit = max(rank["step_bytes"]["total"] / rank["copy_bytes_per_second"] for rank in ranks)
    limit = batch / step_limit
    rates = [run["decode_tokens_per_second"] for run in first["runs"]]
    return {
        "median_run": typical,
        "decode_tokens_per_second": {
            "median": typical["decode_tokens_per_second"],
            "best": max(rates),
            "worst": min(rates),
        },
        "limit_tokens_per_second": limit,
        "share_of_limit": typical["decode_tokens_per_second"] / limit,
        "step_parts": first["step_parts"],
        "device_step": first["device_step"],
        **{name: first["stats"][name] for name in ("decode", "weights", "cache")},
        "transport": first["transport"],
        "machine": first["machine"],
    }


def text(result: dict[str, Any]) -> str:
    return "\n".join([*_head(result), "", *_speed(result), "", *_memory(result), "", *_parts(result)])


def _head(result: dict[str, Any]) -> list[str]:
    layout, first, machine, world = result["layout"], result["ranks"][0], result["machine"], len(result["ranks"])
    sizes = " ".join(f"{name.replace('_', '-')} {n}" for name, n in layout.items() if n > 1) or "tp 1"
    transport = [result["transport"]] if world > 1 else []
    weights = "random weights" if result["dummy_weights"] else "checkpoint weights"
    device = (
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}" if machine["gpu"] else machine["cpu"]
    )
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "flashinfer") if machine[name])
    return [
        f"{result['model']}, {weights}, {first['dtype']}; {sizes} on {world} {'ranks' if world > 1 else 'rank'} "
        f"({', '.join([result['launcher'], *transport, first['device'].split(':')[0]])})",
        f"{device}; {versions}",
        f"decode: {first['stats']['decode']}",
        f"weights: {first['stats']['weights']}; cache: {first['stats']['cache']}",
    ]


def _speed(result: dict[str, Any]) -> list[str]:
    load, run, rates = result["load"], result["median_run"], result["decode_tokens_per_second"]
    spread = f"{rates['worst']:.1f} to {rates['best']:.1f} in {load['runs']} runs"
    between = run["between_tokens_seconds"] or {}
    times = "  ".join(f"{name} {between[name] / MS:.2f}" for name in ("p50", "p90", "p99") if name in between)
    return [
        f"{load['batch']} prompt(s) of {load['input']} tokens, {load['output']} new tokens each",
        f"  decode          {rates['median']:10.1f} tokens/s  ({spread})",
        f"  limit           {result['limit_tokens_per_second']:10.1f} tokens/s  (reached: "
        f"{result['share_of_limit']:.0%})",
        f"  end to end      {run['tokens_per_second']:10.1f} tokens/s",
        f"  first token     {run['first_token_seconds']['p50'] / MS:10.1f} ms        "
        f"(median of the prompts; last one's: {run['first_token_seconds']['max'] / MS:.1f})",
        f"  between tokens  {times} ms",
    ]


def _memory(result: dict[str, Any]) -> list[str]:
    groups = f"{'':13}{' what a decode step must read ':-^54} {' rate ':-^21} {' held at the end ':-^32}"
    header = (
        "rank",
        "weights",
        "experts",
        "expected",
        "seen",
        "cache",
        "reads",
        "copy",
        "weights",
        "cache",
        "host",
        "load",
    )
    rows = [groups, _columns(header)]
    seconds = result["load"]["batch"] / result["decode_tokens_per_second"]["median"]
    for rank in result["ranks"]:
        read, stats, seen = rank["step_bytes"], rank["stats"], rank["touched_seen"]
        cells = (
            str(rank["rank"]),
            _size(read["dense"]),
            _size(read["experts"]),
            f"{read['touched']:.0%}" if read["experts"] else "-",
            "-" if seen is None else f"{seen:.0%}",
            _size(read["cache"]),
            f"{_size(read['total'] / seconds)}/s",
            f"{_size(rank['copy_bytes_per_second'])}/s",
            *map(_size, (stats["weight_bytes"], stats["cache_bytes"], stats["peak_rss_bytes"])),
            f"{stats['load_seconds']:.1f} s",
        )
        rows.append(_columns(cells))
    return rows


def _columns(cells: Iterable[str]) -> str:
    return "  " + " ".join(f"{cell:>10}" for cell in cells)


def _size(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / MB:.2f} MB"


def _parts(result: dict[str, Any]) -> list[str]:
    """Where a step's time goes."""
    names = ("wall", "schedule", "launch", "wait", "other", "collectives", "device")
    headers = (*names, "longest")
    lines = ["mean step of rank 0 (ms)", f"  {'':8} {'steps':>6}" + "".join(f" {name:>11}" for name in headers)]
    for kind, part in result["step_parts"].items():
        cells = (*(part["seconds"][name] for name in names), part["longest_seconds"])
        lines.append(
            f"  {kind:8} {part['steps']:6}" + "".join(f" {'-' if c is None else f'{c / MS:.3f}':>11}" for c in cells)
        )
    work = result["device_step"]
    if work is None:
        return lines
    lines += [
        "",
        f"device, decode step under the profiler: {work['seconds'] / MS:.3f} ms, busy {work['busy_seconds'] / MS:.3f}, "
        f"collectives {work['collective_seconds'] / MS:.3f}",
        f"a kernel's time begins when those before it have ended; {work['overlapped_seconds'] / MS:.3f} ms more of it "
        "overlap with theirs",
    ]
    lines += [
        f"  {row['seconds'] / MS:8.3f} ms {row['calls']:7.1f} x  {row['name'][:90]}" for row in work["kernels"][:10]
    ]
    return lines
