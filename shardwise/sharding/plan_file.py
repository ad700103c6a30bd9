"""A plan document in a file, checked as far as a comparison or a replay reads it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardwise.sharding.config import ConfigError, read_config
from shardwise.sharding.document import SCHEMA_VERSION


class _Kind(NamedTuple):
    """What the value of a field has to be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_LIST = _Kind("a list", lambda value: isinstance(value, list))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_INTEGER = _Kind("an integer", lambda value: type(value) is int)
_INTEGERS = _Kind("a list of integers", lambda value: _LIST.fits(value) and all(map(_INTEGER.fits, value)))
_EXPERTS = _Kind("lists of integers", lambda value: _LIST.fits(value) and all(map(_INTEGERS.fits, value)))

_DOCUMENT = {
    "model": _OBJECT,
    "layout": _OBJECT,
    "options": _OBJECT,
    "ranks": _LIST,
    "collectives": _LIST,
    "warnings": _LIST,
    "hash": _TEXT,
}
_RANK = {
    "rank": _INTEGER,
    "weight_bytes": _INTEGER,
    "kv_bytes_per_token": _INTEGER,
    "state_bytes_per_sequence": _INTEGER,
    "experts": _EXPERTS,
    "tensors": _LIST,
}
_TENSOR = {"pattern": _TEXT, "global_shape": _INTEGERS, "bytes": _INTEGER}
_COLLECTIVE = {"where": _TEXT, "op": _TEXT, "axis": _TEXT, "bytes_per_token": _INTEGER, "count": _INTEGER}


def read_document(path: str | Path) -> dict[str, Any]:
    """A plan that `shardwise plan --json FILE` wrote. ConfigError says what is wrong with any other file."""
    data = read_config(Path(path))
    version = data.get("schema_version")
    if version is None:
        raise ConfigError(f"{path}: no plan, it has no schema_version: `shardwise plan MODEL --json FILE` writes one")
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}: plan anew")
    _check(path, "", data, _DOCUMENT)
    if not data["ranks"]:
        raise ConfigError(f"{path}: ranks is empty: plan anew")
    _check_rows(path, "ranks", data["ranks"], _RANK)
    for row in data["ranks"]:
        if not _INTEGER.fits(row.setdefault("cache_bytes", 0)):  # of no workload, where it is left out
            raise ConfigError(f"{path}: ranks[{row['rank']}].cache_bytes is not {_INTEGER.words}: plan anew")
    _check_rows(path, "ranks[0].tensors", data["ranks"][0]["tensors"], _TENSOR)
    _check_rows(path, "collectives", data["collectives"], _COLLECTIVE)
    return data


def _check_rows(path: str | Path, where: str, rows: list[Any], kinds: Mapping[str, _Kind]) -> None:
    for place, row in enumerate(rows):
        if not _OBJECT.fits(row):
            raise ConfigError(f"{path}: {where}[{place}] is not {_OBJECT.words}: plan anew")
        _check(path, f"{where}[{place}].", row, kinds)


def _check(path: str | Path, prefix: str, row: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> None:
    for name, kind in kinds.items():
        if not kind.fits(row.get(name)):
            raise ConfigError(f"{path}: {prefix}{name} is missing or not {kind.words}: plan anew")
