"""Groups: mesh axes, ranks as threads, the imagined ranks of `fake`, deadlines."""

import threading

import pytest
import torch

from shardwise.comm import watch
from shardwise.comm.base import CollectiveMismatch
from shardwise.comm.fake import FakeCommunicator
from shardwise.comm.p2p.delegate import Delegating
from shardwise.comm.rank import current_groups, use_groups
from shardwise.comm.strategy import make_groups
from shardwise.comm.watch import Deadlines
from shardwise.sharding.layout import ParallelLayout
from shardwise.testing import RankFailed, run_processes, run_threads

AXES = ("tp", "attn_dp", "moe_tp", "moe_ep")


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp=8, moe_ep=4),
        ParallelLayout(tp=2, attn_dp=4, moe_ep=8),
        ParallelLayout(tp=4, attn_dp=2, moe_ep=2),
        ParallelLayout(tp=1, attn_dp=8),
    ],
    ids=str,
)
def test_mesh_groups_hold_the_ranks_that_the_layout_says(layout):
    def body():
        groups = current_groups()
        me = layout.coordinates(groups.world.rank)
        for axis in AXES:
            group = getattr(groups, axis)
            other = {"tp": "attn_dp", "attn_dp": "tp", "moe_tp": "moe_ep", "moe_ep": "moe_tp"}[axis]
            members = [
                rank for rank in range(layout.world) if getattr(layout.coordinates(rank), other) == getattr(me, other)
            ]
            assert group.ranks == tuple(members), axis
            assert group.rank == getattr(me, axis) and group.size == getattr(layout, axis)
            assert group.all_reduce(torch.tensor([groups.world.rank])).item() == sum(members)

    run_threads(layout.world, body, layout=layout)


def test_axes_with_the_same_members_share_a_communicator():
    def body():
        groups = current_groups()
        return groups.tp is groups.world, groups.moe_tp is groups.world, groups.attn_dp.size

    assert run_threads(2, body) == [(True, True, 1)] * 2


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(ValueError, match="tp 4 times attn_dp must be the world of 2; legal tp: 1 2"):
        run_threads(2, lambda: None, layout=ParallelLayout(tp=4))


def test_groups_are_of_the_thread_and_gone_afterwards():
    assert run_threads(3, lambda: current_groups().world.rank) == [0, 1, 2]
    assert current_groups() is None


def test_groups_of_one_thread_may_be_left_in_another():
    groups, others = (make_groups(FakeCommunicator()) for _ in range(2))
    block = use_groups(groups)
    entering = threading.Thread(target=block.__enter__)
    entering.start()
    entering.join()
    with use_groups(others):
        block.__exit__(None, None, None)
        assert current_groups() is others
    assert current_groups() is None


def test_run_threads_raises_the_first_exception_and_ends_the_others():
    def body():
        if current_groups().world.rank == 1:
            raise SystemExit(7)
        current_groups().world.barrier()

    with pytest.raises(SystemExit):
        run_threads(3, body)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_a_folder_that_takes_no_flight_record_does_not_hide_what_failed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(watch.LOG_FOLDER_ENV, str(tmp_path / "file" / "logs"))

    def body():
        group = current_groups().world
        group.all_reduce(torch.ones(2 + group.rank))

    with pytest.raises(CollectiveMismatch, match="rank 0 called .* rank 1 called"):
        run_threads(2, body)


def test_fake_gives_shapes_of_any_world():
    group = FakeCommunicator(3, range(8))
    x = torch.ones(2, 16)
    assert group.all_gather(x, 1).shape == (2, 128)
    assert group.all_gather(x, 0, [1, 1, 1, 2, 1, 1, 1, 1]).shape == (9, 16)
    assert group.reduce_scatter(x, 1).shape == (2, 2)
    assert group.all_to_all(torch.ones(8, 3), [1] * 8, [2] * 8).shape == (16, 3)
    groups = make_groups(group, ParallelLayout(tp=4, attn_dp=2, moe_ep=4))
    assert (groups.tp.ranks, groups.attn_dp.ranks) == ((0, 1, 2, 3), (3, 7))
    assert (groups.moe_ep.ranks, groups.moe_tp.ranks) == ((0, 1, 2, 3), (3, 7))
    assert torch.equal(groups.tp.all_reduce(x), 4 * x)


def test_deadlines_come_from_the_environment():
    assert Deadlines.from_environment({"SHARDWISE_DEADLINE_COLLECTIVE": "7.5"}).collective == 7.5
    for text in ("soon", "0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(ValueError, match="SHARDWISE_DEADLINE_LOAD"):
            Deadlines.from_environment({"SHARDWISE_DEADLINE_LOAD": text})
    with pytest.raises(ValueError, match="SHARDWISE_DEADLINE_LOADING is not a deadline; legal: SHARDWISE_DEAD"):
        Deadlines.from_environment({"SHARDWISE_DEADLINE_LOADING": "7"})


def test_collectives_wait_longer_while_weights_are_read():
    deadlines = Deadlines(collective=1, load=50)
    with watch.phase("load"):
        assert deadlines.in_phase(watch.current_phase()) == 50
    assert deadlines.in_phase(watch.current_phase()) == 1


def test_run_processes_tells_which_rank_failed_and_why():
    with pytest.raises(RankFailed, match="KeyError: 'no such thing'") as caught:
        run_processes(2, "rank_bodies:rank_1_fails")
    assert caught.value.rank == 1


def test_a_group_that_stands_on_another_splits_into_several():
    """As the GPUs' groups do: every rank tells the group beneath the same colors and keys."""

    class Above(Delegating):
        devices = ("cpu",)

        def _split(self, name, members, colors, keys):
            return self._split_fallback(name, colors, keys)

    def body():
        group = Above(current_groups().world, "p2p")
        parts = [
            group.split_known(colors, keys)
            for colors, keys in (([0, 0, 1, 1], None), ([0, 1, 0, 1], [3, 2, 1, 0]), ([5, 5, 5, 2], None))
        ]
        return [(part.ranks, part.all_reduce(torch.tensor([group.rank])).item()) for part in parts]

    results = run_threads(4, body)
    assert results[0] == [((0, 1), 1), ((2, 0), 2), ((0, 1, 2), 3)]
    assert results[3] == [((2, 3), 5), ((3, 1), 4), ((3,), 3)]


def test_control_groups_split_as_the_groups_that_they_serve():
    results = run_processes(4, "rank_bodies:split_with_control")
    assert results == [((0, 1), 1.0, [0, 1]), ((0, 1), 1.0, [0, 1]), ((3, 2), 5.0, [3, 2]), ((3, 2), 5.0, [3, 2])]
