"""What changed between two plan documents."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shardwise.sharding.report import bytes_text, size_text, table

Doc = Mapping[str, Any]


def diff(old: Doc, new: Doc) -> dict[str, Any]:
    """Differences as JSON values; empty lists where nothing changed."""
    return {
        "same": old.get("hash") == new.get("hash"),
        "model": _fields(old["model"], new["model"]),
        "layout": _fields(old["layout"], new["layout"]),
        "ranks": list(_ranks(old, new)),
        "tensors": list(_tensors(old, new)),
        "collectives": list(_collectives(old, new)),
        "warnings": {
            "added": [w for w in new.get("warnings", []) if w not in old.get("warnings", [])],
            "removed": [w for w in old.get("warnings", []) if w not in new.get("warnings", [])],
        },
    }


def diff_text(changes: Mapping[str, Any]) -> str:
    """The differences for people."""
    if changes["same"]:
        return "the plans are the same"
    parts = [f"{part} {f}: {a} -> {b}" for part in ("model", "layout") for f, a, b in changes[part]]
    if changes["ranks"]:
        rows = [(str(r["rank"]), *(_moved(r[k], text) for k, text in _RANK_FIELDS.items())) for r in changes["ranks"]]
        parts.append(table(("rank", "weights", "KV cache a token", "state a sequence"), rows))
    if changes["tensors"]:
        rows = [(t["change"], t["pattern"], _moved(t["bytes"])) for t in changes["tensors"]]
        parts.append(table(("tensors", "pattern", "bytes on rank 0"), rows))
    for c in changes["collectives"]:
        parts.append(f"{c['where']} {c['op']} over {c['axis']}: {c['old']} -> {c['new']} bytes a token and step")
    parts += [f"warning added: {w}" for w in changes["warnings"]["added"]]
    parts += [f"warning gone: {w}" for w in changes["warnings"]["removed"]]
    return "\n".join(parts)


_RANK_FIELDS = {
    "weight_bytes": size_text,
    "kv_bytes_per_token": bytes_text,
    "state_bytes_per_sequence": size_text,
}


def _moved(pair: tuple[int, int], text: Callable[[int], str] = size_text) -> str:
    old, new = pair
    return text(new) if old == new else f"{text(old)} -> {text(new)}"


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
