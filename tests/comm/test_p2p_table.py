"""The choice of strategy and launch is a pure function of what all ranks share."""

import pytest

from shardwise.comm.p2p import table

SIZES = [1, 1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28, 1 << 33]


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("strategy", ["AUTO", "MIN_LATENCY", "ONESHOT", "TWOSHOT"])
def test_every_call_has_a_choice_with_a_reason(world, fused, strategy):
    for nbytes in SIZES:
        choice = table.choose(world, nbytes, fused, strategy)
        assert choice.reason
        if strategy in ("ONESHOT", "TWOSHOT"):
            assert choice.tuning.strategy == strategy
        if strategy == "MIN_LATENCY":
            assert choice.tuning is not None


def test_larger_worlds_go_from_one_shot_over_two_shot_to_nccl():
    for world in (4, 8):
        names = [
            c.tuning.strategy if c.tuning else "NCCL" for c in (table.choose(world, n, False, "AUTO") for n in SIZES)
        ]
        order = ["ONESHOT", "TWOSHOT", "NCCL"]
        assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
        assert set(names) == set(order)


def test_two_ranks_never_need_nccl():
    assert all(table.choose(2, nbytes, fused, "AUTO").tuning for nbytes in SIZES for fused in (False, True))


def test_gathers_of_small_parts_are_one_kernel():
    for world, ours in ((2, 4), (4, 3), (8, 3)):
        choices = [table.choose_gather(world, nbytes) for nbytes in SIZES]
        assert [choice.tuning for choice in choices] == [table.GATHER] * ours + [None] * (len(SIZES) - ours)
        assert all(choice.reason for choice in choices)
