"""The conformance suite on ranks as threads, and on one rank alone."""

import conformance
import pytest
import random_calls

from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.strategy import create
from shardwise.testing import run_threads


def _case(case, world, **options):
    run_threads(world, lambda: conformance.run(current_groups().world, (case,)), **options)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("case", conformance.CASES + conformance.FIXED_ORDER_CASES, ids=lambda c: c.__name__)
def test_threads(case, world):
    _case(case, world)


@pytest.mark.parametrize("options", [{"check": True}, {"deterministic": True}], ids=["check", "deterministic"])
def test_threads_in_modes(options):
    run_threads(3, lambda: conformance.run(current_groups().world), **options)


@pytest.mark.parametrize("options", [{}, {"check": True, "deterministic": True}], ids=["plain", "in modes"])
def test_random_calls_with_dawdling_ranks(options):
    def body():
        return random_calls.Calls(random_calls.several(current_groups().world), seed=3).run(100)

    assert all(len(made) == len(random_calls.KINDS) for made in run_threads(4, body, **options))


@pytest.mark.parametrize("case", conformance.CASES, ids=lambda c: c.__name__)
def test_one_rank_alone(case):
    conformance.run(create(RankInfo()), (case,))
