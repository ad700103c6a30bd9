"""What changed between two plan documents."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shardwise.sharding.report import bytes_text, size_text, table

Doc = Mapping[str, Any]


def diff(old: Doc, new: Doc) -> dict[str, Any]:
    """Differences as JSON values; empty lists where nothing changed."""
    changes: dict[str, Any] = {part: _fields(old[part], new[part]) for part in _FIELDS}
    changes |= {
        "ranks": list(_ranks(old, new)),
        "experts": list(_experts(old, new)),
        "tensors": list(_tensors(old, new)),
        "collectives": list(_collectives(old, new)),
        "cost": _fields(dict(_flat(old.get("cost", {}))), dict(_flat(new.get("cost", {})))),
        "warnings": {
            "added": [w for w in new.get("warnings", []) if w not in old.get("warnings", [])],
            "removed": [w for w in old.get("warnings", []) if w not in new.get("warnings", [])],
        },
    }
    parts = (*(rows for rows in changes.values() if isinstance(rows, list)), *changes["warnings"].values())
    return {"same": old["hash"] == new["hash"] and not any(parts)} | changes


def diff_text(changes: Mapping[str, Any]) -> str:
    """The differences for people."""
    if changes["same"]:
        return "the plans are the same"
    parts = [f"{part} {f}: {a} -> {b}" for part in _FIELDS for f, a, b in changes[part]]
    if changes["ranks"]:
        shown = {k: field for k, field in _RANK_FIELDS.items() if any(any(r[k]) for r in changes["ranks"])}
        rows = [(str(r["rank"]), *(_moved(r[k], text) for k, (_, text) in shown.items())) for r in changes["ranks"]]
        parts.append(table(("rank", *(name for name, _ in shown.values())), rows))
    parts += [
        f"rank {e['rank']}, experts added: {_numbers(e['added'])}; removed: {_numbers(e['removed'])}"
        for e in changes["experts"]
    ]
    if changes["tensors"]:
        rows = [(t["change"], t["pattern"], _moved(t["bytes"])) for t in changes["tensors"]]
        parts.append(table(("tensors", "pattern", "bytes on rank 0"), rows))
    for c in changes["collectives"]:
        parts.append(f"{c['where']} {c['op']} over {c['axis']}: {c['old']} -> {c['new']} bytes a token and step")
    parts += [f"cost {f}: {_number(a)} -> {_number(b)}" for f, a, b in changes["cost"]]
    parts += [f"warning added: {w}" for w in changes["warnings"]["added"]]
    parts += [f"warning gone: {w}" for w in changes["warnings"]["removed"]]
    return "\n".join(parts)


_FIELDS = ("model", "layout", "options")
_RANK_FIELDS: dict[str, tuple[str, Callable[[int], str]]] = {
    "weight_bytes": ("weights", size_text),
    "kv_bytes_per_token": ("KV cache a token", bytes_text),
    "state_bytes_per_sequence": ("state a sequence", size_text),
    "cache_bytes": ("cache", size_text),
}
SHOWN = 12
"""Experts that a line lists before it only counts."""


def _moved(pair: tuple[int, int], text: Callable[[int], str] = size_text) -> str:
    old, new = pair
    return text(new) if old == new else f"{text(old)} -> {text(new)}"


def _numbers(experts: list[int]) -> str:
    more = f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else ""
    return (" ".join(map(str, experts[:SHOWN])) or "none") + more


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values inside of nested objects, by their names joined with dots."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


def _fields(old: Doc, new: Doc) -> list[tuple[str, Any, Any]]:
    keys = [*old, *(k for k in new if k not in old)]
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]


def _ranks(old: Doc, new: Doc) -> Iterator[dict[str, Any]]:
    before, after = ({r["rank"]: r for r in d["ranks"]} for d in (old, new))
    for rank in sorted(before.keys() | after.keys()):
        a, b = before.get(rank, {}), after.get(rank, {})
        row = {k: (a.get(k, 0), b.get(k, 0)) for k in _RANK_FIELDS}
        if any(x != y for x, y in row.values()):
            yield {"rank": rank, **row}


def _experts(old: Doc, new: Doc) -> Iterator[dict[str, Any]]:
    """Experts that a rank of both plans got or gave away, of all its mixtures together."""
    for a, b in zip(old["ranks"], new["ranks"], strict=False):
        before, after = (Counter(e for part in r["experts"] for e in part) for r in (a, b))
        if before != after:
            added, removed = (sorted((x - y).elements()) for x, y in ((after, before), (before, after)))
            yield {"rank": b["rank"], "added": added, "removed": removed}


def _tensors(old: Doc, new: Doc) -> Iterator[dict[str, Any]]:
    """Patterns of rank 0 that came, went, or have another shape, type, count or range."""
    before, after = (
        {(t["pattern"], tuple(t["global_shape"])): t for t in d["ranks"][0]["tensors"]} for d in (old, new)
    )
    for key in [*before, *(k for k in after if k not in before)]:
        a, b = before.get(key), after.get(key)
        if a == b:
            continue
        sizes = (a["bytes"] if a else 0, b["bytes"] if b else 0)
        change = "added" if a is None else "removed" if b is None else _kind(sizes)
        yield {"pattern": key[0], "change": change, "bytes": sizes}


def _kind(sizes: tuple[int, int]) -> str:
    return "grew" if sizes[1] > sizes[0] else "shrank" if sizes[1] < sizes[0] else "moved"


def _collectives(old: Doc, new: Doc) -> Iterator[dict[str, Any]]:
    def sums(doc: Doc) -> dict[tuple[str, str, str], int]:
        found: dict[tuple[str, str, str], int] = {}
        for c in doc["collectives"]:
            key = (c["where"], c["op"], c["axis"])
            found[key] = found.get(key, 0) + c["bytes_per_token"] * c["count"]
        return found

    before, after = sums(old), sums(new)
    for key in [*before, *(k for k in after if k not in before)]:
        a, b = before.get(key, 0), after.get(key, 0)
        if a != b:
            yield dict(zip(("where", "op", "axis"), key, strict=True)) | {"old": a, "new": b}
