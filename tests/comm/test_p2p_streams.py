"""The order of calls on several streams, which are stand-ins."""

import threading

import pytest
import torch

from shardwise.comm.fake import FakeCommunicator
from shardwise.comm.p2p import streams
from shardwise.comm.p2p.delegate import WithoutKernels
from shardwise.comm.p2p.streams import StreamOrder


class Stream:
    def __init__(self, handle: int):
        self.handle = handle
        self.waited_for: list[int] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other.handle)


@pytest.fixture
def on(monkeypatch):
    """on(stream, group): the group is called while `stream` is the current one."""
    current: list[Stream] = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: current[0].handle, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(streams, "_thread", streams._Thread())

    def call(stream: Stream, group: StreamOrder) -> None:
        current[:] = [stream]
        group.take()

    return call


def group(device: int = 0) -> StreamOrder:
    return StreamOrder(torch.device("cuda", device))


def test_calls_of_one_group_wait_for_each_other_across_streams(on):
    a, b, one = Stream(1), Stream(2), group()
    on(a, one)
    on(a, one)
    assert a.waited_for == []
    on(b, one)
    assert b.waited_for == [1]
    on(b, one)
    assert b.waited_for == [1]


def test_calls_of_two_groups_on_a_gpu_wait_for_each_other_across_streams(on):
    """Each may need all multiprocessors for blocks that wait: at the same time neither would get them."""
    a, b, first, second, elsewhere = Stream(1), Stream(2), group(), group(), group(device=1)
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
    a, b, one = Stream(1), Stream(2), group()
    on(a, one)
    thread = threading.Thread(target=on, args=(b, one))
    thread.start()
    thread.join()
    assert b.waited_for == [1]


def test_groups_of_two_threads_do_not_wait_for_each_other(on):
    """Their order may differ between ranks, which would be a deadlock."""
    a, b, first, second = Stream(1), Stream(2), group(), group()
    on(a, first)
    thread = threading.Thread(target=on, args=(b, second))
    thread.start()
    thread.join()
    assert b.waited_for == []


def test_calls_that_no_own_kernel_serves_are_in_the_order_too(on, monkeypatch):
    """NCCL's kernels wait for other ranks as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    a, b, one = Stream(1), Stream(2), group()
    beside = WithoutKernels(FakeCommunicator(0, range(3)), "three ranks", lambda fallback: fallback)
    on(a, one)
    on(b, beside._order)
    assert b.waited_for == [1]
    beside.barrier()
    on(a, one)
    assert a.waited_for == [2]
