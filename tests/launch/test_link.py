"""The line between ranks and parent: order, secrets, broken ends."""

import contextlib
import json
import os
import select
import socket
import threading

import pytest

from shardwise.launch.link import Hub, Link


@pytest.fixture(params=["unix", "tcp"])
def hub(request, tmp_path):
    hub = Hub(tmp_path, "secret", None if request.param == "unix" else "127.0.0.1")
    yield hub
    hub.close()


def test_a_folder_of_any_length_holds_the_line(tmp_path):
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    with contextlib.closing(Hub(folder, "secret")) as hub:
        connected(hub, 3).send({"event": "x"})
        assert hub.hello[3].rank == 3 and [path.name for path in folder.iterdir()] == ["link"]
    assert list(folder.iterdir()) == []


def take(hub: Hub, count: int) -> list[dict]:
    events: list[dict] = []
    while len(events) < count:
        got, _ = hub.wait(5.0)
        events += got
    return events


def connected(hub: Hub, rank: int = 0) -> Link:
    link = Link(hub.address, "secret", rank)
    while rank not in hub.hello:
        hub.wait(5.0)
    return link


def test_events_arrive_in_order_with_their_rank(hub):
    link = connected(hub, 1)

    def talk():
        for number in range(500):
            link.send({"event": "token", "number": number, "text": "ü\n"})

    talker = threading.Thread(target=talk)  # the socket holds fewer than 500 lines: a parent that lags slows rank 0
    talker.start()
    got = take(hub, 500)
    talker.join()
    assert [event["number"] for event in got] == list(range(500))
    assert {event["rank"] for event in got} == {1} and got[0]["text"] == "ü\n"
    assert hub.hello[1].pid == os.getpid() and hub.hello[1].host == socket.gethostname()
    link.close()


def test_a_rank_looks_whether_a_command_is_there_without_waiting(hub):
    link = connected(hub)
    commands = link.commands()
    assert link.take("leave") is None
    long = threading.Thread(target=hub.send, args=[{"command": "generate", "prompts": ["x" * (1 << 20)]}])
    long.start()
    assert len(next(commands)["prompts"][0]) == 1 << 20
    long.join()
    hub.send({"command": "leave", "call": 1})
    while (command := link.take("leave")) is None:
        pass
    assert command["call"] == 1
    hub.send({"command": "generate"})
    hub.send({"command": "leave"})
    assert link.take("leave") is None  # another one comes before
    assert [next(commands)["command"] for _ in range(2)] == ["generate", "leave"]
    link.close()


def test_commands_reach_every_rank_until_stop(hub):
    links = [connected(hub, rank) for rank in range(3)]
    hub.send({"command": "generate", "prompts": ["x"]})
    hub.send({"command": "stop"})
    for link in links:
        assert [command["command"] for command in link.commands()] == ["generate"]
        link.close()


def test_a_stranger_is_not_heard(hub):
    stranger = Link(hub.address, "guess", 0)
    stranger.send({"event": "done", "value": "forged"})
    raw = socket.socket(socket.AF_UNIX if isinstance(hub.address, str) else socket.AF_INET)
    raw.connect(hub.address)
    raw.sendall(json.dumps({"event": "done", "value": "forged"}).encode() + b"\n")
    events = []
    while len(select.select([stranger._socket, raw], [], [], 0)[0]) < 2:  # until both lines are closed
        events += hub.wait(0.02)[0]
    assert events == [] and hub.hello == {}
    stranger.close()
    raw.close()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\n",
        b"7\n",
        b"{}\n",
        b'{"event": "hello"}\n',
        '{"event": "hello", "token": "gu\u00e9"}\n'.encode(),
        b'{"event": "hello", "token": "secret", "rank": 0}\n',
        b"[" * 3000 + b"\n",
        b"x" * (1 << 16),
    ],
    ids=lambda words: repr(words[:40]),
)
def test_a_stranger_may_say_anything(hub, words):
    raw = socket.socket(socket.AF_UNIX if isinstance(hub.address, str) else socket.AF_INET)
    raw.connect(hub.address)
    raw.sendall(words)
    events = []
    while not select.select([raw], [], [], 0)[0]:  # until the line is closed
        events += hub.wait(0.02)[0]
    assert events == [] and hub.hello == {}
    with contextlib.suppress(ConnectionResetError):  # so it is closed where some of it was not read
        assert raw.recv(1) == b""
    raw.close()
    connected(hub).close()


def test_what_was_said_before_an_end_stands_beside_it(hub):
    reader, writer = os.pipe()
    hub.watch(reader)
    link = Link(hub.address, "secret", 0)
    link.send({"event": "done", "value": 7})
    os.write(writer, b".")
    events, woken = hub.wait(5.0)
    assert [event["event"] for event in events] == ["hello", "done"] and woken == [reader]
    hub.forget(reader)
    link.close()
    os.close(reader)
    os.close(writer)


def test_a_rank_hears_that_its_parent_is_gone(tmp_path):
    hub = Hub(tmp_path, "secret")
    link = connected(hub)
    lost = threading.Event()
    link.call_when_lost(lost.set)
    hub.close()
    assert lost.wait(60)
    link.close()
