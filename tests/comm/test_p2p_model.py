"""The protocol of the peer-to-peer kernels under every order of events that an adversary finds."""

import pytest

from shardwise.comm.p2p.machine import Faults, Rules
from shardwise.comm.p2p.model import explore, run_threads, simulate

SEEDS = range(60)
MIXED = [
    *(("ONESHOT", 3), ("TWOSHOT", 5), ("ONESHOT", 1), ("ONESHOT", 4), ("TWOSHOT", 1), ("ONESHOT", 6)),
    *(("TWOSHOT", 8), ("ONESHOT", 1), ("ONESHOT", 7), ("ONESHOT", 2)),
]


def outcomes(world, calls, **options):
    return [simulate(seed, world, calls, **options) for seed in SEEDS]


@pytest.mark.parametrize(
    "world, calls, options",
    [
        (2, [("ONESHOT", 3), ("TWOSHOT", 4), ("ONESHOT", 1, 2), ("TWOSHOT", 3), ("ONESHOT", 2)], {}),
        (2, [("TWOSHOT", 1, 2), ("ONESHOT", 4), ("TWOSHOT", 4), ("TWOSHOT", 2), ("ONESHOT", 3)], {"ahead": 1}),
        (2, [("ONESHOT", 4), ("TWOSHOT", 3), ("ONESHOT", 3)], {"blocks": (1, 3)}),
        (2, [("TWOSHOT", 6)] * 3, {"blocks": 3, "pushers": 2}),
        (2, [("TWOSHOT", 4), ("TWOSHOT", 5), ("ONESHOT", 3)], {"blocks": (4, 2), "pushers": 2}),
        (2, [("TWOSHOT", 6), ("TWOSHOT", 5), ("TWOSHOT", 4)], {"blocks": (2, 3), "share": 2}),
        (3, [("TWOSHOT", 1), ("ONESHOT", 1), ("TWOSHOT", 1), ("TWOSHOT", 1)], {"blocks": 1}),
        (3, [("TWOSHOT", 2)] * 3, {"blocks": 3, "pushers": 2}),
        (4, [("TWOSHOT", 1)] * 4, {"blocks": 1}),
        (4, [("TWOSHOT", 1), ("TWOSHOT", 2), ("TWOSHOT", 1)], {"blocks": 4, "pushers": 3}),
    ],
)
def test_small_sequences_are_right_in_every_order(world, calls, options):
    """Calls whose rows and sums lie on each other's words in a slot; ranks without a row; launches of other sizes."""
    states, outcome = explore(world, calls, **options)
    assert outcome.stale == []
    assert outcome.missing == {}
    assert outcome.finished == [len(calls)] * world
    assert states > 250, "there is more than one order"


with_rules = pytest.mark.parametrize(
    "rules, safe",
    [
        (Rules(slots=2, rearm="at once"), True),
        (Rules(slots=3, rearm="at once"), True),
        (Rules(slots=3, rearm="next call"), True),
        (Rules(slots=1, rearm="at once"), False),
        (Rules(slots=2, rearm="next call"), False),
        (Rules(slots=2, rearm="never"), False),
    ],
    ids=lambda value: f"{value.slots} slots, re-armed {value.rearm}" if isinstance(value, Rules) else "",
)


@with_rules
def test_which_rules_are_safe_in_every_order(rules, safe):
    _, outcome = explore(2, [("ONESHOT", 2)] * 5, rules=rules)
    assert (outcome.stale == [] and outcome.finished == [5, 5]) == safe


def test_a_dead_rank_is_named_in_every_order():
    _, outcome = explore(3, [("TWOSHOT", 2), ("ONESHOT", 1)], blocks=1, faults=Faults(dead={1: 1}))
    assert outcome.stale == []
    assert outcome.missing == {0: {1}, 2: {1}}
    assert outcome.finished == [1, 1, 1]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("slow", [(), (0,), (1,)])
def test_no_stale_word_and_no_lost_wakeup(world, blocks, slow):
    for outcome in outcomes(world, MIXED, blocks=blocks, ahead=len(slow), faults=Faults(slow=frozenset(slow))):
        assert outcome.stale == []
        assert outcome.missing == {}
        assert outcome.finished == [len(MIXED)] * world


def test_two_slots_hold_for_a_rank_that_has_no_row_of_its_own():
    calls = [("TWOSHOT", 1)] * 8
    for outcome in outcomes(4, calls, faults=Faults(slow=frozenset((3,)))):
        assert outcome.stale == []
        assert outcome.finished == [8] * 4


@with_rules
def test_which_rules_are_safe(rules, safe):
    found = outcomes(2, [("ONESHOT", 2)] * 6, rules=rules, faults=Faults(slow=frozenset((1,))))
    broken = [outcome for outcome in found if outcome.stale or outcome.finished != [6, 6]]
    assert bool(broken) != safe


@pytest.mark.parametrize("kind, rows", [("ONESHOT", 4), ("TWOSHOT", 4), ("TWOSHOT", 8)])
@pytest.mark.parametrize("world, dead", [(2, 1), (4, 2)])
def test_a_dead_rank_is_named_by_all_who_waited_for_it(world, dead, kind, rows):
    for outcome in outcomes(world, [(kind, rows)] * 4, faults=Faults(dead={dead: 2})):
        assert outcome.stale == []
        assert outcome.finished[dead] == 2
        survivors = [rank for rank in range(world) if rank != dead]
        assert all(outcome.finished[rank] <= 2 for rank in survivors)
        assert set(outcome.missing) == set(survivors)
        assert all(dead in outcome.missing[rank] for rank in survivors)


def test_a_dropped_store_is_a_timeout_that_names_its_sender():
    for outcome in outcomes(2, [("ONESHOT", 3)] * 5, faults=Faults(drop={(1, 0): 2})):
        assert outcome.stale == []
        assert outcome.missing[0] == {1}
        assert outcome.finished[0] == 2


@pytest.mark.parametrize("kind", ["ONESHOT", "TWOSHOT"])
@pytest.mark.parametrize("rows", [2, 9])
def test_another_number_of_rows_on_one_rank_ends_in_a_timeout_not_in_wrong_data(kind, rows):
    calls = [(kind, 4)] * 6
    for outcome in outcomes(2, calls, faults=Faults(rows={(1, 2): rows})):
        wrong = [text for text in outcome.stale if "call 2" not in text]
        assert wrong == [], "a later call never sees what the mismatch left behind"
        assert outcome.missing, "somebody waits for rows that were never sent"
        assert all(finished < len(calls) for finished in outcome.finished)


def test_threads_reach_the_same_end():
    outcome = run_threads(4, MIXED * 3, 60.0, faults=Faults(slow=frozenset((2,))))
    assert outcome.stale == []
    assert outcome.finished == [len(MIXED) * 3] * 4


def test_threads_name_the_rank_that_never_came():
    outcome = run_threads(2, [("ONESHOT", 2)] * 3, 1.0, faults=Faults(dead={1: 1}))
    assert outcome.missing == {0: {1}}
    assert outcome.finished == [1, 1]
