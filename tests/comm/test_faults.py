"""A rank that is late, dead, or calls something else: the others learn which one, in bounded time."""

import contextlib
import gc
import json
import os
import threading
import time
import weakref
from types import SimpleNamespace

import fault_ranks
import pytest
import torch

from shardwise.comm import leaving, torch_wait, watch
from shardwise.comm.arrival import MessageArrivals
from shardwise.comm.base import CollectiveMismatch, CollectiveTimeout, CommError, PeerLost
from shardwise.comm.control import MESSAGE_BYTES, fingerprint
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.segment import Segment, WaitFailed
from shardwise.comm.strategy import create
from shardwise.comm.watch import Deadlines
from shardwise.testing import run_processes, run_threads

pytestmark = pytest.mark.alone
TRANSPORTS = ("shm", "gloo", "mpi")


def test_threads_name_the_missing_rank():
    here = threading.Barrier(2)

    def body():
        group = current_groups().world
        group.all_reduce(torch.ones(2))
        if group.rank == 1:
            return
        group.deadlines = Deadlines(collective=0.5)
        here.wait(60)
        with pytest.raises(CollectiveTimeout) as caught:
            group.all_reduce(torch.ones(2))
        assert caught.value.missing == (1,)
        assert f"all_reduce #2 on group world, rank {group.rank}: rank(s) 1 did not arrive" in str(caught.value)
        with pytest.raises(CommError, match="did not arrive"):
            group.barrier()

    run_threads(3, body)


def test_threads_wait_for_a_slow_rank():
    def body():
        group = current_groups().world
        if group.rank == 0:
            time.sleep(0.3)
        return group.all_reduce(torch.ones(2)).tolist()

    assert run_threads(2, body, deadlines=Deadlines(collective=60)) == [[2.0, 2.0]] * 2


def test_a_failing_thread_unblocks_the_others():
    def body():
        group = current_groups().world.split(0)
        if group.rank == 2:
            raise KeyError("lost key")
        group.barrier()

    begin = time.monotonic()
    with pytest.raises(KeyError):
        run_threads(3, body, deadlines=Deadlines(collective=60))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("how", ["shape", "dtype", "op"])
def test_threads_in_check_mode_name_both_calls(how):
    def body():
        group = current_groups().world
        odd = group.rank == 1
        x = torch.ones(5 if odd and how == "shape" else 4, dtype=torch.int32 if odd and how == "dtype" else torch.int64)
        with pytest.raises(CollectiveMismatch) as caught:
            if how == "op" and odd:
                group.reduce_scatter(x)
            else:
                group.all_reduce(x)
        text = str(caught.value)
        assert "rank 0 called #1 all_reduce shape=(4,) dtype=torch.int64" in text
        assert {"shape": "shape=(5,)", "dtype": "torch.int32", "op": "rank 1 called #1 reduce_scatter"}[how] in text

    run_threads(3, body, check=True)


def told(world, target, *args, tmp_path, mpi=False, may_die=()):
    """What the ranks have left for the test (`Board.leave`): mpirun ends a rank when another one leaves first."""
    run_processes(world, target, *args, str(tmp_path), mpi=mpi, may_die=range(world) if mpi else may_die)
    return fault_ranks.left(str(tmp_path), world)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_slow_rank_is_waited_for_and_a_late_one_is_named(transport, tmp_path):
    mpi = transport == "mpi"
    results = told(3, "fault_ranks:one_rank_is_slow_then_late", transport, 2, tmp_path=tmp_path, mpi=mpi)
    for rank in (0, 1):
        slow, (kind, text, missing, seconds), again, last = results[rank]
        assert slow[0] == "nothing" and slow[3] > 0.2
        assert kind == "CollectiveTimeout", text
        assert missing == (2,)
        assert f"all_reduce #3 on group world, rank {rank}: rank(s) 2 did not arrive within 1.5 s" in text
        assert 1.4 < seconds < 10
        assert again[0] == "CommError" and "did not arrive" in again[1]
        assert (last["op"], last["sequence"], last["end"]) == ("all_reduce", 3, 0)


@pytest.mark.parametrize("transport", ["gloo", "mpi without shared memory"])
def test_a_rank_that_waits_is_not_missing_however_much_later_it_came(transport, tmp_path):
    mpi = transport != "gloo"
    results = told(3, "fault_ranks:one_rank_waits_longer", transport, tmp_path=tmp_path, mpi=mpi)
    kind, text, missing, _ = results[0]
    assert (kind, missing) == ("CollectiveTimeout", (2,)), text
    assert results[1][0] == "CommError" and "rank 0 has given up" in results[1][1]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_dead_rank_is_noticed_long_before_the_deadline(transport):
    results = run_processes(3, "fault_ranks:one_rank_dies", transport, 1, may_die=(1,))
    kind, text, missing, seconds = results[0]
    assert kind == "PeerLost" and "all_reduce #2 on group world, rank 0" in text and "is gone" in text
    assert seconds < 15
    if transport == "shm":
        assert missing == (1,)


def test_a_rank_that_dies_before_it_told_what_it_called_is_lost():
    kind, text, missing, _ = run_processes(2, "fault_ranks:one_rank_dies_of_a_difference", may_die=(1,))[0]
    assert kind == "PeerLost" and missing == (1,), text


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_abort_unblocks_waiting_peers_in_sub_groups_too(transport, tmp_path):
    results = told(4, "fault_ranks:rank_0_aborts", transport, tmp_path=tmp_path)
    outcomes = [results[1][0], results[2][0], results[3][0], results[2][1]]
    for kind, text, _, seconds in outcomes:
        assert kind == "CommError" and "rank 0 ran out of ideas" in text
        assert seconds < 15


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forked_process_is_refused_and_disturbs_nobody(transport):
    results = run_processes(2, "fault_ranks:fork_and_call", transport, mpi=transport == "mpi")
    assert results == [(0, [2.0] * 4, "nothing")] * 2


def test_the_reason_of_an_abort_outlives_the_connection():
    kind, text, _, _ = run_processes(2, "fault_ranks:rank_1_aborts_and_is_gone", may_die=(1,))[0]
    assert kind == "CommError" and "rank 1 lost its files" in text


@pytest.mark.parametrize("transport, check", [("gloo", True), ("shm", True), ("shm", False), ("mpi", False)])
def test_both_calls_are_named_in_check_mode_and_always_where_ranks_meet_in_memory(transport, check, tmp_path):
    mpi = transport == "mpi"
    results = told(2, "fault_ranks:calls_differ", transport, check, tmp_path=tmp_path, mpi=mpi, may_die=(0, 1))
    odd = {
        "shape": "rank 1 called #2 all_reduce shape=(5,)",
        "dtype": "rank 1 called #2 all_reduce shape=(4,) dtype=torch.bfloat16",
        "op": "rank 1 called #2 barrier",
        "strategy": "strategy=TWOSHOT",
        "root": "rank 1 called #2 broadcast shape=(4,) dtype=torch.float32 strategy= group=world (1,)",
        "part": "rank 1 called #2 reduce_scatter shape=(9,)",
        "object": "rank 1 called #2 all_gather_object",
        "nothing": "rank 1 called #2 all_reduce shape=(0,)",
        "large": "rank 1 called #2 all_reduce shape=(4194304,)",
        "large parts": "rank 1 called #2 reduce_scatter shape=(4194304,)",
        "colors": "rank 1 called #1 split shape=() dtype= strategy= group=world ((0, 0), (0, 1))",
    }
    for result in results:
        for how, words in odd.items():
            kind, text, _, _ = result[how]
            assert kind == "CollectiveMismatch", (how, text)
            number = 1 if how == "colors" else 2
            assert f"rank 0 called #{number} " in text and words in text
        assert result["sizes"][0] == "nothing", "equal sizes are not a mismatch, however they were computed"


def test_two_threads_in_one_group_end_in_bounded_time():
    for seen in run_processes(2, "fault_ranks:two_threads_call_at_once"):
        assert len(seen) == 2 and any(kind != "nothing" for kind, *_ in seen)
        assert all(seconds < 20 for *_, seconds in seen)


def test_a_failure_dumps_the_flight_record(tmp_path, monkeypatch):
    monkeypatch.setenv(watch.LOG_FOLDER_ENV, str(tmp_path))
    left = threading.Event()

    def body():
        group = current_groups().world
        for _ in range(300):
            group.barrier()
        if group.rank == 0:
            assert left.wait(60)
            group.deadlines = Deadlines(collective=0.2)
            with pytest.raises(CollectiveTimeout) as caught:
                group.all_gather(torch.ones(3, 2), 1)
            return caught.value.__notes__
        left.set()

    notes = run_threads(2, body)[0]
    record = json.loads((tmp_path / "flight-rank0.json").read_text())
    assert str(tmp_path / "flight-rank0.json") in notes[0]
    assert len(record["collectives"]) == watch.FLIGHT_LENGTH
    last = record["collectives"][-1]
    assert (last["op"], last["shape"], last["dtype"], last["sequence"]) == ("all_gather", [3, 2], "float32", 301)
    assert last["end"] == 0 and record["collectives"][-2]["end"] > 0


def test_what_mpi_may_still_write_stays_when_a_meeting_gives_up(monkeypatch):
    """The request holds the memory; other calls let MPI go on with it."""

    class Request:
        def Test(self):
            return False

    class Comm:
        def Iallreduce(self, shown, sums):
            request = Request()
            kept.append(weakref.ref(request))
            return request

        def Iprobe(self, **_):
            return False

    kept = []
    meeting = MessageArrivals.__new__(MessageArrivals)
    meeting.comm, meeting.rank, meeting.size, meeting.count, meeting._sent = Comm(), 0, 2, 0, []
    meeting._answered, meeting._left = 0, {}
    meeting._roll_call = lambda: {0}
    monkeypatch.setattr(leaving, "_unusable", False)
    with pytest.raises(WaitFailed):
        meeting.meet(0.01, 7)
    gc.collect()
    assert kept[0]() is not None and not leaving.leave_all(1)


@pytest.mark.parametrize("error", [None, "Timed out waiting 1800000ms for recv operation to complete"])
def test_gloo_work_that_ends_right_after_a_slice_is_asked_how_it_ended(monkeypatch, error):
    """Its wait says that it timed out, and it is done when the rank looks."""

    class Work:
        ended = False

        def is_completed(self):
            return self.ended

        def wait(self, limit):
            if not self.ended:
                self.ended = True
                raise RuntimeError("Operation timed out!")
            if error:
                raise RuntimeError(error)

    with gloo_work(monkeypatch, Work()) as group:
        if error is None:
            assert group.broadcast(torch.ones(2), 0).tolist() == [1.0, 1.0]
        else:
            with pytest.raises(CommError, match=f"broadcast #1 on group world, rank 0: gloo failed: {error}"):
                group.broadcast(torch.ones(2), 0)


@contextlib.contextmanager
def gloo_work(monkeypatch, work):
    """A group whose broadcasts are `work`."""
    group = create(RankInfo(), transport="gloo")
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: work)
    try:
        yield group
    finally:
        group.close()


def test_of_two_ranks_that_abort_at_once_one_is_heard_with_its_whole_reason():
    class Interrupted:
        """Words, before the first of which is written something else happens."""

        def __init__(self, words, event):
            self.words, self.events = words, [event]

        def __getitem__(self, place):
            return self.words[place]

        def __setitem__(self, place, value):
            if self.events:
                self.events.pop()()
            self.words[place] = value

    memory = os.memfd_create("test")
    os.ftruncate(memory, Segment.length(2, 64))
    first, second = (Segment(memory, 2, rank, 64, [], True) for rank in range(2))
    os.close(memory)
    first.words = Interrupted(first.words, lambda: second.abort("rank 1 has no more room on its disk"))
    first.abort("rank 0 is tired")
    assert second.aborted in ("rank 0 is tired", "rank 1 has no more room on its disk")


class Unfinished:
    """Work that is done after some slices of its wait, or never."""

    def __init__(self, slices=10**9):
        self.slices = slices

    def is_completed(self):
        return not self.slices

    def wait(self, limit):
        if self.slices:
            self.slices -= 1
            raise RuntimeError("Operation timed out!")


@pytest.mark.parametrize("slices", [2, 10**9])
def test_what_rank_0_sent_counts_though_it_left_and_the_store_with_it(monkeypatch, slices):
    def gone(keys):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(torch_wait, "GRACE_SECONDS", 0.05)
    with gloo_work(monkeypatch, Unfinished(slices)) as group:
        monkeypatch.setattr(group.store, "store", SimpleNamespace(check=gone))
        if slices == 2:
            assert group.broadcast(torch.ones(2), 0).tolist() == [1.0, 1.0]
        else:
            with pytest.raises(PeerLost, match="its process is gone: Connection reset by peer"):
                group.broadcast(torch.ones(2), 0)


def test_nobody_is_called_missing_by_a_rank_that_loses_the_store_amid_the_roll_call(monkeypatch):
    """Rank 0 has called the roll before it, and left."""

    class Leaving:
        set = staticmethod(lambda key, value: None)

        def check(self, keys):
            if keys[0].startswith("late/") and not keys[0].endswith("called"):
                raise RuntimeError("Connection reset by peer")
            return False

    with gloo_work(monkeypatch, Unfinished()) as group:
        group.deadlines = Deadlines(collective=0.01)
        monkeypatch.setattr(group.store, "store", Leaving())
        with pytest.raises(CollectiveTimeout, match="not done within 0.01 s, no roll call: Connection reset") as caught:
            group.broadcast(torch.ones(2), 0)
    assert caught.value.missing == ()


def test_gloo_work_that_ends_while_its_rank_was_stopped_is_not_late(monkeypatch):
    """The deadline passes within the first slice."""
    work = Unfinished(1)
    with gloo_work(monkeypatch, work) as group, monkeypatch.context() as patch:
        patch.setattr(torch_wait, "time", SimpleNamespace(monotonic=lambda: 0 if work.slices else 1000))
        assert group.broadcast(torch.ones(2), 0).tolist() == [1.0, 1.0]


def test_check_mode_sees_a_difference_behind_what_is_too_long_to_send():
    sizes = [1000] * 100
    calls = [fingerprint(f"all_gather {(*sizes, last)}") for last in (7, 8)]
    assert len(calls[0]) == len(calls[1]) == MESSAGE_BYTES
    assert calls[0] != calls[1]
