"""NCCL_SYMMETRIC's window: when it is refused, and what it does with NCCL, which a stand-in plays here."""

import ctypes
import re
import types

import pytest
import torch
import torch.distributed as dist

from shardwise.comm import window
from shardwise.comm.base import CommError, Unavailable


@pytest.fixture
def usable(monkeypatch):
    """A process that may make a window."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.delenv("NCCL_ENV_PLUGIN", raising=False)
    monkeypatch.setattr(window, "_started_with", lambda name: "0")
    monkeypatch.setattr(window, "_version", lambda: (2, 28, 9))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", types.SimpleNamespace(_comm_ptr=None), raising=False)


def test_a_process_that_was_started_right_may_make_one(usable):
    assert window.obstacle(2, capturing=False) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda patch: patch.delenv("NCCL_NVLS_ENABLE"), "NCCL_NVLS_ENABLE=0 must be set before the process starts"),
        (lambda patch: patch.setenv("NCCL_NVLS_ENABLE", "2"), "NCCL_NVLS_ENABLE=0 must be set"),
        (lambda patch: patch.setattr(window, "_started_with", lambda name: None), "NCCL_NVLS_ENABLE=0 must be set"),
        (lambda patch: patch.setenv("NCCL_ENV_PLUGIN", "x"), "NCCL_ENV_PLUGIN is set"),
        (lambda patch: patch.setattr(window, "_version", lambda: (2, 26, 5)), r"NCCL 2.27 to 2.31.*\(2, 26, 5\)"),
        (lambda patch: patch.setattr(window, "_version", lambda: (2, 32, 3)), r"NCCL 2.27 to 2.31.*\(2, 32, 3\)"),
        (lambda patch: patch.setattr(dist, "ProcessGroupNCCL", object), "does not tell NCCL's communicator"),
    ],
)
def test_what_could_touch_multicast_or_is_unknown_is_refused(usable, monkeypatch, change, reason):
    change(monkeypatch)
    assert re.search(reason, window.obstacle(2, capturing=False))


def test_a_window_is_not_made_within_a_graph(usable):
    assert "captured" in window.obstacle(2, capturing=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has loaded NCCL")
def test_without_nccl_the_reason_says_so(usable, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setattr(window, "_started_with", lambda name: "0")
    assert "no libnccl.so.2" in window.obstacle(2, capturing=False)


def test_the_environment_that_counts_is_the_one_the_process_was_started_with(monkeypatch):
    monkeypatch.setenv("SHARDWISE_SET_TOO_LATE", "0")
    assert window._started_with("SHARDWISE_SET_TOO_LATE") is None
    assert window._started_with("PATH")


def test_integers_are_refused():
    with pytest.raises(CommError, match="not torch.int32"):
        window.require_dtype(torch.int32)


class Nccl:
    """NCCL of one rank whose peer has the same values: a sum doubles."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails
        self.memory = ctypes.create_string_buffer(window.BUFFER_BYTES)

    def call(self, name, *arguments):
        self.calls.append(name)
        if name == self.fails:
            raise CommError(f"{name} failed: out of memory (error 1)")
        if name == "ncclMemAlloc":
            arguments[0]._obj.value = ctypes.addressof(self.memory)
        if name == "ncclCommWindowRegister":
            arguments[3]._obj.value = 7

    def reduce(self, tensor, group=None):
        self.calls.append(("sum", tensor.nbytes))
        tensor.mul_(2)


@pytest.fixture
def make(monkeypatch):
    """make(nccl, tell): a Window on a stand-in."""

    def of(nccl, tell=lambda value: [value, value]):
        monkeypatch.setattr(window, "_call", nccl.call)
        monkeypatch.setattr(window, "BUFFER_BYTES", 64)
        monkeypatch.setattr(dist, "all_reduce", nccl.reduce)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(
            torch, "as_tensor", lambda source, device: torch.frombuffer(nccl.memory, dtype=torch.uint8)[:64]
        )
        group = types.SimpleNamespace(_get_backend=lambda device: types.SimpleNamespace(_comm_ptr=lambda: 5))
        return window.Window(group, torch.device("cpu"), tell)

    return of


def test_longer_tensors_go_through_the_window_in_pieces(make):
    nccl = Nccl()
    stage = make(nccl)
    source = torch.arange(37, dtype=torch.float32)
    target = torch.empty_like(source)
    stage.all_reduce(source, target)
    assert torch.equal(target, source * 2)
    assert nccl.calls[3:] == [("sum", 64), ("sum", 64), ("sum", 20)], "16 floats fill 64 bytes"
    stage.close()
    stage.close()
    assert nccl.calls[-2:] == ["ncclCommWindowDeregister", "ncclMemFree"]


def test_ranks_of_two_hosts_are_refused(make):
    with pytest.raises(Unavailable, match="several hosts"):
        make(Nccl(), lambda value: [value, "another host"])


def test_a_failure_of_one_rank_is_raised_on_all_and_keeps_nothing(make):
    nccl = Nccl(fails="ncclCommWindowRegister")
    with pytest.raises(CommError, match="rank 0: ncclCommWindowRegister failed: out of memory"):
        make(nccl)
    assert nccl.calls[-1] == "ncclMemFree"
    peer = Nccl()
    answers = iter([["host", "host"], [None, None], [None, "no memory"]])
    with pytest.raises(CommError, match="rank 1: no memory"):
        make(peer, lambda value: next(answers))
    assert peer.calls[-2:] == ["ncclCommWindowDeregister", "ncclMemFree"]
