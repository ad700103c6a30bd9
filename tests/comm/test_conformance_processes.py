"""The conformance suite on real processes: shared memory, gloo, MPI."""

import conformance
import pytest
import random_calls

from shardwise.testing import run_processes


@pytest.mark.parametrize(
    ("transport", "world", "options"),
    [
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


def test_conformance_shared_memory():
    for runs in run_processes(3, "rank_bodies:conform_shared_memory"):
        assert [len(passed) for passed, _ in runs] == [len(conformance.CASES + conformance.FIXED_ORDER_CASES)] * 2
        assert "in shared memory" in runs[1][1]


def test_conformance_mpi():
    results = run_processes(3, "rank_bodies:conform", "mpi", {}, mpi=True)
    assert all(len(passed) == len(conformance.CASES + conformance.FIXED_ORDER_CASES) for passed, _ in results)
    assert "mpi (asked for by name)" in results[0][1]


def test_conformance_mpi_across_hosts():
    """Without shared memory the ranks meet by messages; the cases and their results are the same."""
    passed = run_processes(2, "rank_bodies:conform_without_shared_memory", mpi=True)
    assert len(passed[0]) == len(conformance.CASES)


def test_mpi_mode_rides_shared_memory_on_one_host():
    results = run_processes(2, "rank_bodies:conform", "auto", {}, mpi=True)
    assert "shm (2 ranks on one host" in results[0][1]


@pytest.mark.parametrize(("transport", "world", "calls"), [("shm", 4, 120), ("mpi", 2, 60)])
def test_random_calls_with_dawdling_ranks(transport, world, calls):
    """Four are more than this project's test machines have cores; every result is checked in place."""
    for made in run_processes(world, "rank_bodies:random_sequence", transport, calls, 5, mpi=transport == "mpi"):
        assert sum(made.values()) == calls and len(made) == len(random_calls.KINDS)


@pytest.mark.parametrize(("mpi", "transport"), [(False, "gloo"), (True, "mpi")], ids=["demo", "MPI"])
def test_auto_falls_back_where_shared_memory_cannot_be_made(mpi, transport):
    results = run_processes(2, "rank_bodies:without_memory", mpi=mpi)
    assert [(name, total) for name, _, total in results] == [(transport, 3.0)] * 2
    assert results[0][1] == results[1][1]
    assert "No space left on device" in results[0][1]


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_the_same_ranks_may_be_split_off_again_when_the_group_before_is_closed(transport):
    results = run_processes(3, "rank_bodies:split_again_and_again", transport, mpi=transport == "mpi")
    assert results == [[2.0] * 8, [2.0] * 8, [1.0] * 8]


@pytest.mark.parametrize(("mpi", "transport"), [(False, "gloo"), (True, "mpi")], ids=["demo", "MPI"])
def test_a_closed_group_and_those_split_off_it_leave_nothing_with_the_library(mpi, transport):
    for (before, split, closed), refused in run_processes(2, "rank_bodies:close_parts", transport, mpi=mpi):
        assert split == before + 2
        assert closed == before
        assert "the group is closed" in refused
