"""Rendezvous: how ranks that share nothing yet exchange their first few bytes.

A store holds small values by key: a folder (ranks started locally), torch's TCPStore (torchrun, Ray), or a store of
your own with `set` and `get`. `Rendezvous` turns a store, an MPI communicator or a process group into the one thing
that transports need: everyone's value, in rank order.
"""

import ipaddress
import json
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from shardwise.comm.base import CollectiveTimeout, CommError, Unavailable
from shardwise.comm.rank import RankInfo

STORE_ENV = "SHARDWISE_STORE"
"""Folder of the store that a local launcher made for its ranks."""


class Store(Protocol):
    """Key-value store seen by all ranks of a job. A key is set once."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, timeout: float) -> bytes:
        """Wait for the key at most `timeout` seconds, then raise TimeoutError."""
        ...


class FolderStore:
    """Store in a folder that all ranks see: one file a key, written under another name and renamed."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __eq__(self, other) -> bool:
        return isinstance(other, FolderStore) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def _path(self, key: str) -> Path:
        return self.folder / (quote(key, safe="") + ".value")

    def set(self, key: str, value: bytes) -> None:
        path = self._path(key)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_bytes(value)
        unfinished.rename(path)

    def get(self, key: str, timeout: float) -> bytes:
        end = time.monotonic() + timeout
        pause = 0.0005
        while True:
            late = time.monotonic() > end  # before the look, which may find what came while this rank was not running
            try:
                return self._path(key).read_bytes()
            except FileNotFoundError:
                if late:
                    raise TimeoutError(f"key {key!r} was not set within {timeout:g} s in {self.folder}") from None
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)


class TorchStore:
    """A torch.distributed store (TCPStore, PrefixStore, ...) as ours; `mark` tells it from those of other groups."""

    def __init__(self, store, mark: str = ""):
        self.store = store
        self.mark = mark

    def set(self, key: str, value: bytes) -> None:
        self.store.set(key, value)

    def has(self, key: str) -> bool:
        """Whether somebody has set the key. RuntimeError where the store is gone."""
        return self.store.check([key])

    def get(self, key: str, timeout: float) -> bytes:
        import torch.distributed as dist

        try:
            try:
                self.store.wait([key], timedelta(seconds=timeout))
            except dist.DistStoreError:  # also where a busy server answers late
                if not self.has(key):
                    raise
            return self.store.get(key)
        except (dist.DistStoreError, RuntimeError) as error:
            raise TimeoutError(f"key {key!r} was not set within {timeout:g} s: {error}") from None


def tcp_store(info: RankInfo, host: str, port: int, timeout: float) -> TorchStore:
    """Torch's TCPStore at `host:port`, served by rank 0. CollectiveTimeout where that does not come in time."""
    import torch.distributed as dist

    if info.rank:
        _await_server(info.rank, host, port, timeout)
    store = dist.TCPStore(
        host, port, info.world, info.rank == 0, timeout=timedelta(seconds=timeout), wait_for_workers=False
    )
    return TorchStore(store)


def _await_server(rank: int, host: str, port: int, timeout: float) -> None:
    """Torch would wait twice as long for it, and then tell where its own C++ was."""
    end = time.monotonic() + timeout
    while True:
        late = time.monotonic() > end
        try:
            socket.create_connection((host, port), max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:  # also of a name that nobody knows yet
            if late:
                where = f"rendezvous at {host}:{port}, rank {rank}"
                words = f"{where}: rank 0 did not open it within {timeout:g} s ({error})"
                raise CollectiveTimeout(words, (0,)) from None
        time.sleep(0.05)


def own_address() -> str:
    """IPv4 address of the interface by which this host reaches others; 127.0.0.1 where it has none.

    Not that of the host's name: Debian and its kin write 127.0.1.1 beside it, where peers meet themselves.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        try:
            line.connect(("192.0.2.1", 9))  # of RFC 5737, nobody's; UDP sends nothing here, it only picks the interface
        except OSError:  # no route leads out
            return _address_of_name()
        return line.getsockname()[0]


def _address_of_name() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def require_reachable(host: str, names: Sequence[str]) -> None:
    """CommError where `host` is a loopback address and the ranks are on several hosts, called `names`."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback and len(set(names)) > 1:
        raise CommError(
            f"rank 0 on host {names[0]} announces the address {host}, which leads every other host to itself: the "
            f"ranks are on {', '.join(dict.fromkeys(names))}. Set MASTER_ADDR to an address of {names[0]} that the "
            "others reach, on all ranks"
        )


def store_from_environment(info: RankInfo, timeout: float, environ=os.environ) -> Store:
    """The store that the launcher announced: a folder, or MASTER_ADDR and MASTER_PORT."""
    if environ.get(STORE_ENV):
        return FolderStore(environ[STORE_ENV])
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        place = environ["MASTER_ADDR"], _port(environ["MASTER_PORT"])
        if place[1] == 0:  # torchrun's static rendezvous binds some port and announces the 0 that it was given
            raise ValueError(
                "MASTER_PORT=0 names no port to meet at: start torchrun with --standalone, without --master-port, or "
                "with the number of a free port"
            )
        if place not in _torchrun_stores:  # a job has one: its port can be bound once
            _torchrun_stores[place] = _torchrun_store(info, *place, timeout, environ)
        return _torchrun_stores[place]
    raise Unavailable(
        f"rank {info.rank} of {info.world} ({info.source}) has no rendezvous: neither {STORE_ENV} nor MASTER_ADDR and "
        "MASTER_PORT are set. Start ranks with `shardwise run -n`, torchrun or mpirun, or pass store= to create()"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise ValueError(f"MASTER_PORT={text!r} is not the number of a port, 1 to 65535")
    return int(text)


_torchrun_stores: dict[tuple[str, int], Store] = {}


def _torchrun_store(info: RankInfo, host: str, port: int, timeout: float, environ) -> TorchStore:
    import torch.distributed as dist

    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return tcp_store(info, host, port, timeout)
    limit = timedelta(seconds=timeout)  # torchrun's agent serves it, no rank does
    agent = dist.TCPStore(host, port, info.world, False, timeout=limit, wait_for_workers=False)
    return TorchStore(dist.PrefixStore(f"shardwise/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agent))


_meetings: dict[Store, int] = {}


def world_rendezvous(store: Store, info: RankInfo) -> "StoreRendezvous":
    """Of all ranks of a job. A store may serve several: the n-th of this process meets the n-th of the others."""
    _meetings[store] = number = _meetings.get(store, 0) + 1
    return StoreRendezvous(store, info.rank, range(info.world), f"world{number}")


class Rendezvous(ABC):
    """A group that can gather small values before it has a transport: numbers, texts, None and tuples of these."""

    def __init__(self, rank: int, ranks: Sequence[int]):
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)

    @abstractmethod
    def gather(self, key: str, value: Any, timeout: float) -> list[Any]:
        """Everyone's `value`, in rank order. Raises CollectiveTimeout naming who did not come. Use a key once."""


class StoreRendezvous(Rendezvous):
    """Through a store; `prefix` keeps jobs and groups that share one apart."""

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], prefix: str = "world"):
        super().__init__(rank, ranks)
        self.store = store
        self.prefix = prefix

    def gather(self, key: str, value: Any, timeout: float) -> list[Any]:
        self.store.set(f"{self.prefix}/{key}/{self.rank}", json.dumps(value).encode())
        end = time.monotonic() + timeout
        values: list[Any] = []
        missing: list[int] = []
        for rank in range(self.size):
            try:
                blob = self.store.get(f"{self.prefix}/{key}/{rank}", max(0.01, end - time.monotonic()))
                values.append(self._read(blob, key, rank))
            except TimeoutError:
                missing.append(self.ranks[rank])
        if missing:
            raise CollectiveTimeout(
                f"rendezvous {self.prefix}/{key}, rank {self.ranks[self.rank]}: rank(s) "
                f"{', '.join(map(str, missing))} did not arrive within {timeout:g} s",
                tuple(missing),
            )
        return values

    def _read(self, blob: bytes, key: str, rank: int) -> Any:
        """Data only: a store may be open to the network, and nothing that lies there is run."""
        try:
            return _with_tuples(json.loads(blob))
        except ValueError:
            raise CommError(
                f"rendezvous {self.prefix}/{key}: what stands in the store for rank {self.ranks[rank]} is not JSON, so "
                "no rank of this job and version wrote it"
            ) from None


def _with_tuples(value: Any) -> Any:
    """`value` with tuples where JSON has lists, as other rendezvous give them."""
    return tuple(_with_tuples(each) for each in value) if isinstance(value, list) else value


class AloneRendezvous(Rendezvous):
    """Of a job of one rank."""

    def __init__(self) -> None:
        super().__init__(0, (0,))

    def gather(self, key: str, value: Any, timeout: float) -> list[Any]:
        return [value]


class GroupRendezvous(Rendezvous):
    """Through an existing group, whose own deadlines hold."""

    def __init__(self, group):
        super().__init__(group.rank, group.ranks)
        self.group = group

    def gather(self, key: str, value: Any, timeout: float) -> list[Any]:
        return self.group.all_gather_object(value)
