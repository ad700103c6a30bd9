"""The line between a rank and the process that started it: JSON objects, one a line, over a stream socket.

A Unix socket in the job's private folder where all ranks are on this host; TCP with a secret of the job otherwise
(Ray). Ranks send events (phase, progress, text, done, failed); the parent sends commands, the same to every rank.
"""

import contextlib
import hmac
import json
import os
import select
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwise.comm.watch import process_start

Address = str | tuple[str, int]
HELLO_BYTES = 4096
"""More than a hello has: whoever sends so much and no line is a stranger."""


class Link:
    """A rank's end. Raises ConnectionError when the parent is gone."""

    def __init__(self, address: Address, token: str, rank: int):
        self._socket = _connect(address)
        self._pending = bytearray()
        self._closed = False
        pid = os.getpid()
        self.send(
            {
                "event": "hello",
                "token": token,
                "rank": rank,
                "pid": pid,
                "started": process_start(pid),
                "host": socket.gethostname(),
            }
        )

    def send(self, event: dict) -> None:
        self._socket.sendall(json.dumps(event).encode() + b"\n")

    def commands(self) -> Iterator[dict]:
        """What the parent asks for, until it closes the line or says stop."""
        while (line := self._line(wait=True)) is not None:
            del self._pending[: len(line) + 1]
            command = json.loads(line)
            if command["command"] == "stop":
                return
            yield command

    def take(self, name: str) -> dict | None:
        """The parent's next command if it has come and has this name; it is not among `commands` then."""
        line = self._line(wait=False)
        if line is None or (command := json.loads(line))["command"] != name:
            return None
        del self._pending[: len(line) + 1]
        return command

    def _line(self, wait: bool) -> bytes | None:
        """The next whole line, left in the buffer; None where there is none yet, with `wait` at the stream's end."""
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            if not wait and not select.select([self._socket], [], [], 0)[0]:
                return None
            data = self._socket.recv(1 << 20)
            if not data:
                return None
            self._pending += data
        return bytes(self._pending[:end])

    def call_when_lost(self, function: Callable[[], None]) -> None:
        """Call `function` in a thread of its own when the parent's end goes away before this one is closed."""

        def watch() -> None:
            hangup = select.poll()
            hangup.register(self._socket, select.POLLRDHUP)
            hangup.poll()
            if not self._closed:
                function()

        threading.Thread(target=watch, name="shardwise-link", daemon=True).start()

    def closing(self) -> None:
        """From now on the parent may go away."""
        self._closed = True

    def close(self) -> None:
        self.closing()
        self._socket.close()


def _connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(address) as path:
            line.connect(path)
    else:
        line = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        line.connect(tuple(address))
    return line


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """Another path to the same file: an address of a Unix socket has 107 bytes, and TMPDIR may be longer than that."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Hello:
    """A rank that reported: enough to name it, and to end it without hitting a stranger who got its pid."""

    rank: int
    pid: int
    started: int
    host: str


@dataclass
class _Peer:
    line: socket.socket
    rank: int | None = None
    pending: bytes = b""


class Hub:
    """The parent's end: all ranks' events in the order in which they came."""

    def __init__(self, folder: Path, token: str, tcp_host: str | None = None):
        self._token = token
        self._selector = selectors.DefaultSelector()
        self._listener, self.address = _listen(folder, tcp_host)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._peers: dict[int, _Peer] = {}
        self._events: deque[dict] = deque()
        self._sending = threading.RLock()  # reentrant: a collected iterator may send amid another line's turn
        self.hello: dict[int, Hello] = {}

    def watch(self, descriptor: int) -> None:
        """Wake `wait` when `descriptor` becomes readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, "sentinel")

    def forget(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)

    def wait(self, seconds: float) -> tuple[list[dict], list[int]]:
        """(events of ranks, descriptors that woke us); both empty when the time is over.

        With a descriptor that tells that a rank has ended come all events that the rank sent before; in a wait of 0
        seconds, all that any rank has sent.
        """
        ready = self._selector.select(seconds)
        woken = [key.fd for key, _ in ready if key.data == "sentinel"]
        while lines := [key for key, _ in ready if key.data != "sentinel"]:
            for key in lines:
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            ready = self._selector.select(0) if woken or not seconds else []
        events = list(self._events)
        self._events.clear()
        return events, woken

    def hears(self, rank: int) -> bool:
        """Whether more may come from this rank: it has reported, and its line has not ended."""
        return rank in self._peers

    def send(self, command: dict) -> None:
        """The same command to every rank that is still connected."""
        text = json.dumps(command).encode() + b"\n"
        with self._sending:
            for peer in list(self._peers.values()):
                with contextlib.suppress(OSError):
                    peer.line.sendall(text)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data != "sentinel":
                key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._peers.clear()
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)

    def _accept(self) -> None:
        line, _ = self._listener.accept()
        self._selector.register(line, selectors.EVENT_READ, _Peer(line))

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.line.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        *lines, peer.pending = (peer.pending + data).split(b"\n")
        for line in lines:
            if peer.rank is None and not self._greeted(peer, line):
                self._drop(peer)
                return
            self._events.append({**json.loads(line), "rank": peer.rank})
        if peer.rank is None and len(peer.pending) > HELLO_BYTES:
            self._drop(peer)

    def _greeted(self, peer: _Peer, line: bytes) -> bool:
        """Whether this is a rank's hello; a stranger may have sent anything."""
        try:
            event = json.loads(line)
            if event["event"] != "hello" or not hmac.compare_digest(event["token"].encode(), self._token.encode()):
                return False
            hello = Hello(event["rank"], event["pid"], event["started"], event["host"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False
        peer.rank = hello.rank
        self._peers[hello.rank], self.hello[hello.rank] = peer, hello
        return True

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.line)
        peer.line.close()
        if peer.rank is not None and self._peers.get(peer.rank) is peer:
            del self._peers[peer.rank]


def _listen(folder: Path, tcp_host: str | None) -> tuple[socket.socket, Address]:
    address: Address
    if tcp_host is None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = str(folder / "link")
        with _short(address) as path:
            listener.bind(path)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((tcp_host, 0))
        address = (tcp_host, listener.getsockname()[1])
    listener.listen(128)
    return listener, address
