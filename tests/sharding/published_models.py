"""Configs of published models, and figures about them that were computed without this package."""

import json
from functools import cache
from pathlib import Path

from shardwise.sharding.model import ModelSpec
from shardwise.sharding.source import load_model

DATA = Path(__file__).parent / "data"
CONFIGS = {
    row["_meta"]["name"]: row for row in map(json.loads, (DATA / "published_configs.jsonl").read_text().splitlines())
}
"""By model name, as published (long ignore lists shortened)."""
TOTALS = json.loads((DATA / "parameter_totals.json").read_text())
GOLDEN = json.loads((DATA / "golden_per_rank.json").read_text())


@cache
def model(name: str) -> ModelSpec:
    return load_model(CONFIGS[name])
