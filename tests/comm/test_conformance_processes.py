"""The conformance suite on real processes: shared memory and gloo."""

import conformance
import pytest

from shardwise.testing import run_processes


@pytest.mark.parametrize(
    ("transport", "world", "options"),
    [
        ("shm", 2, {}),
        ("shm", 3, {}),
        ("auto", 2, {"check": True}),
        ("gloo", 2, {}),
        ("gloo", 3, {"deterministic": True}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_conformance(transport, world, options):
    results = run_processes(world, "rank_bodies:conform", transport, options)
    for passed, why in results:
        assert len(passed) >= len(conformance.CASES)
        assert why == results[0][1], "ranks give different reasons"
    expected = "shm (2 ranks on one host" if transport == "auto" else f"{transport} (asked for by name)"
    assert expected in results[0][1]
