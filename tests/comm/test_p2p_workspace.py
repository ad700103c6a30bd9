"""The order of calls on several streams, and when memory is given back. Streams and memory are stand-ins."""

import importlib.util
import threading

import numpy
import pytest
import torch

from shardwise.comm.base import CollectiveTimeout
from shardwise.comm.p2p import cuda
from shardwise.comm.p2p.workspace import ONE_SHOT, RECORDS, Workspace


class Stream:
    def __init__(self, handle: int):
        self.handle = handle
        self.waited_for: list[int] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other.handle)


@pytest.fixture
def on(monkeypatch):
    """on(stream, workspace): the workspace is called while `stream` is the current one."""
    current: list[Stream] = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: current[0].handle, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def call(stream: Stream, workspace: Workspace) -> None:
        current[:] = [stream]
        workspace.take_stream()

    return call


def workspace(device: int = 0) -> Workspace:
    made = Workspace.__new__(Workspace)
    made.device, made.rank, made.ranks = device, 0, (0, 1)
    made.failure, made._base, made._opened = None, 1 << 20, {}
    made._seen = numpy.zeros(2 * RECORDS, dtype=numpy.int64)
    return made


def test_calls_of_one_group_wait_for_each_other_across_streams(on):
    a, b, group = Stream(1), Stream(2), workspace()
    on(a, group)
    on(a, group)
    assert a.waited_for == []
    on(b, group)
    assert b.waited_for == [1]
    on(b, group)
    assert b.waited_for == [1]


def test_calls_of_two_groups_on_a_gpu_wait_for_each_other_across_streams(on):
    """Each may need all multiprocessors for blocks that wait: at the same time neither would get them."""
    a, b, first, second, elsewhere = Stream(1), Stream(2), workspace(), workspace(), workspace(device=1)
    on(a, first)
    on(b, second)
    assert b.waited_for == [1]
    on(a, first)
    assert 2 in a.waited_for
    on(Stream(3), elsewhere)
    on(a, second)
    waits = len(a.waited_for)
    on(a, first)
    on(a, second)
    assert len(a.waited_for) == waits, "calls in turn on one stream wait for nothing"


def test_a_group_that_goes_to_another_thread_waits_there_too(on):
    a, b, group = Stream(1), Stream(2), workspace()
    on(a, group)
    thread = threading.Thread(target=on, args=(b, group))
    thread.start()
    thread.join()
    assert b.waited_for == [1]


def test_groups_of_two_threads_do_not_wait_for_each_other(on):
    """Their order may differ between ranks, which would be a deadlock."""
    a, b, first, second = Stream(1), Stream(2), workspace(), workspace()
    on(a, first)
    thread = threading.Thread(target=on, args=(b, second))
    thread.start()
    thread.join()
    assert b.waited_for == []


def test_memory_that_a_late_rank_may_still_write_is_kept(monkeypatch):
    """Also where nobody had asked whether a wait gave up, as after a graph's replay."""
    freed = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda, "free", lambda address, device: freed.append(address))
    late = workspace()
    late._seen[1] = 7 | ONE_SHOT << 32
    late.close()
    assert freed == []
    with pytest.raises(CollectiveTimeout, match="call 7 .* never received rank 1's data"):
        late.check()
    workspace().close()
    assert freed == [1 << 20]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_a_gpu_that_lacks_instructions_or_room_for_blocks_is_refused(monkeypatch, capability):
    """The group beneath then serves: a launch would not compile, or wait for blocks that never start."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda, "malloc", lambda size, device: pytest.fail("memory is allocated"))
    made = workspace()
    made.size, made.region_bytes = 2, 1 << 20
    with pytest.raises(ValueError, match="the kernels are built for 9.x and 10.x"):
        made._allocate()
