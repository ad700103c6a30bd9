"""How ranks find each other and wait for each other: stores, addresses, memory, MPI across hosts."""

import errno
import json
import os
import pickle
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from shardwise.comm import arrival, bootstrap
from shardwise.comm.base import CollectiveTimeout, CommError, Unavailable
from shardwise.comm.bootstrap import (
    FolderStore,
    StoreRendezvous,
    TorchStore,
    own_address,
    require_reachable,
    store_from_environment,
    tcp_store,
)
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.sharing import share
from shardwise.testing import run_processes, run_threads


def test_ranks_without_a_rendezvous_are_told_how_to_get_one():
    with pytest.raises(Unavailable, match="MASTER_ADDR.*torchrun or mpirun"):
        store_from_environment(RankInfo(1, 2, 1, 2), 1.0, environ={})


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "1.5"])
def test_a_port_that_is_none_is_refused_by_the_name_of_its_variable(port):
    with pytest.raises(ValueError, match=f"MASTER_PORT='{port}'"):
        store_from_environment(RankInfo(1, 2, 1, 2), 1.0, {"MASTER_ADDR": "here", "MASTER_PORT": port})


def test_a_rendezvous_names_who_did_not_come(tmp_path):
    meeting = StoreRendezvous(FolderStore(tmp_path), 1, range(4))
    FolderStore(tmp_path).set("world/hello/3", b"null")
    begin = time.monotonic()
    with pytest.raises(CollectiveTimeout, match=r"rank 1: rank\(s\) 0, 2 did not arrive within 0.2 s") as caught:
        meeting.gather("hello", None, 0.2)
    assert caught.value.missing == (0, 2)
    assert time.monotonic() - begin < 2


def test_a_rank_0_that_opens_no_store_is_named_without_words_of_torchs_own(capfd):
    with socket.socket() as deaf:  # bound, but nobody listens
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        with pytest.raises(CollectiveTimeout, match=f"127.0.0.1:{port}, rank 1: rank 0 did not open it") as caught:
            tcp_store(RankInfo(1, 2, 1, 2), "127.0.0.1", port, 0.2)
    assert caught.value.missing == (0,) and capfd.readouterr() == ("", "")


def test_a_store_that_opens_late_is_waited_for(capfd):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(tcp_store, RankInfo(1, 2, 1, 2), "127.0.0.1", port, 60.0)
        time.sleep(0.1)
        served = tcp_store(RankInfo(0, 2, 0, 2), "127.0.0.1", port, 60.0)
        served.set("key", b"value")
        assert late.result().get("key", 60.0) == b"value"
    assert capfd.readouterr().err == ""


def test_a_store_that_opens_while_its_rank_is_stopped_until_after_the_deadline_is_met(monkeypatch):
    clock, looks = SimpleNamespace(now=0.0), []

    def connect(place, limit):
        looks.append(place)
        if len(looks) == 1:
            clock.now = 100.0
            raise ConnectionRefusedError
        return socket.socket()

    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(bootstrap, "time", fake)
    monkeypatch.setattr(socket, "create_connection", connect)
    bootstrap._await_server(1, "node", 5, 1.0)
    assert looks == [("node", 5)] * 2


class Route:
    """Stands for a UDP socket of a host whose interface is 10.1.2.3."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def connect(self, place):
        self.place = place

    def getsockname(self):
        return "10.1.2.3", 40000


def test_a_host_announces_its_interface_even_where_its_name_is_loopback(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: Route())
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert own_address() == "10.1.2.3"


def test_a_host_without_a_way_out_goes_by_its_name(monkeypatch):
    def unreachable(self, place):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", lambda *_: Route())
    monkeypatch.setattr(Route, "connect", unreachable)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert own_address() == "127.0.1.1"


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1", "localhost", "::1"])
def test_a_loopback_address_serves_one_host_only(address):
    require_reachable(address, ["a", "a"])
    require_reachable("10.1.2.3", ["a", "b"])
    require_reachable("node-7", ["a", "b"])
    with pytest.raises(CommError, match=f"announces the address {address}.*a, b.*MASTER_ADDR"):
        require_reachable(address, ["a", "a", "b"])


def test_what_lies_in_a_store_is_read_as_data_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    store = FolderStore(tmp_path)
    store.set("world/hello/1", pickle.dumps(Trap()))
    with pytest.raises(CommError, match="for rank 1 is not JSON"):
        StoreRendezvous(store, 0, range(2)).gather("hello", None, 1.0)
    assert not (tmp_path / "sprung").exists()


def test_a_store_gives_back_what_the_ranks_put_in(tmp_path):
    value = ("host \u00e4 \udc80", 1 << 63, None, True, (1.5, ()))
    store = FolderStore(tmp_path)
    StoreRendezvous(store, 1, range(2)).store.set("world/facts/1", json.dumps(value).encode())
    assert StoreRendezvous(store, 0, range(2)).gather("facts", value, 1.0) == [value, value]


def test_a_folder_store_gives_back_any_key(tmp_path):
    store = FolderStore(tmp_path / "new")
    store.set("a/b c:%", b"\0value")
    assert store.get("a/b c:%", 0.1) == b"\0value"
    with pytest.raises(TimeoutError, match="key 'other'"):
        store.get("other", 0.05)


def test_what_was_stored_while_a_rank_was_stopped_until_after_its_deadline_is_found(tmp_path, monkeypatch):
    store, read, clock = FolderStore(tmp_path), Path.read_bytes, SimpleNamespace(now=0.0)

    def stopped(path):
        monkeypatch.setattr(Path, "read_bytes", read)
        store.set("key", b"value")
        clock.now = 100.0
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", stopped)
    monkeypatch.setattr(bootstrap, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda seconds: None))
    assert store.get("key", 1.0) == b"value"


def test_a_busy_store_that_answers_after_the_wait_is_heard():
    class Busy:
        def wait(self, keys, limit):
            raise dist.DistStoreError("wait timeout after 10ms")

        def check(self, keys):
            return keys == ["key"]

        def get(self, key):
            return b"value"

    assert TorchStore(Busy()).get("key", 0.01) == b"value"
    with pytest.raises(TimeoutError, match="key 'other' was not set within 0.01 s: wait timeout"):
        TorchStore(Busy()).get("other", 0.01)


class LateComm:
    """Stands for an MPI communicator whose sum is there at second 5 of a clock that moves by a look or a sleep."""

    now = 0.0
    tests = 0

    def Dup(self):
        return self

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def Iprobe(self, **_):
        return None

    def Iallreduce(self, mine, sums):
        for place, value in enumerate(mine):
            sums[place] = self.Get_size() * value
        return self

    def monotonic(self):
        self.now += 1e-3
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def Test(self):
        self.tests += 1
        return self.now > 5 or self.tests > 100_000


def test_a_rank_that_waits_long_for_ranks_of_other_hosts_leaves_its_core(monkeypatch):
    comm = LateComm()
    monkeypatch.setattr(arrival, "_owned", [])
    monkeypatch.setattr(arrival, "time", comm)
    arrival.MessageArrivals(comm).meet(60.0, 7)
    assert comm.now > 5 and comm.tests < 10_000


def test_a_sum_of_other_hosts_that_ends_while_its_rank_is_stopped_is_not_late(monkeypatch):
    class StoppedComm(LateComm):
        def Test(self):
            self.tests += 1
            if self.tests == 64:  # the clock is looked at after so many
                self.now += 100
            return self.tests > 64

    comm = StoppedComm()
    monkeypatch.setattr(arrival, "_owned", [])
    monkeypatch.setattr(arrival, "time", comm)
    arrival.MessageArrivals(comm).meet(60.0, 7)


def test_memory_that_cannot_be_made_is_every_ranks_error(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "too many open files")

    def body():
        world = current_groups().world
        with pytest.raises(OSError, match="too many open files.*could not make the memory"):
            share(lambda key, value: world.all_gather_object(value), [0, 1], world.rank, 64, key="test")

    monkeypatch.setattr(os, "memfd_create", refuse)
    run_threads(2, body)


def test_one_store_serves_several_groups():
    assert run_processes(2, "rank_bodies:create_twice") == [[3.0, 30.0, 300.0]] * 2
