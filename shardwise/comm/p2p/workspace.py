"""Memory that the ranks of one host push into: allocation, exchange of handles, and what says that a wait gave up."""

import contextlib
import importlib.util
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.p2p import cuda
from shardwise.kernel_start import on_device

if TYPE_CHECKING:
    from shardwise.comm.base import Communicator

SLOTS = 2
COUNTERS = 1024
"""Copies of the call counter: no launch has more blocks."""
HEADER_BYTES = 4096
"""In front of the slots: the abort word, alone on its cache line."""
_CAPABILITIES = (9, 10)
"""Major ones that have the kernels' instructions, and multiprocessors that hold as many blocks as launch.py counts."""
_GRAIN = 2 << 20
"""cudaMalloc packs smaller allocations in one mapping, which a handle would share whole."""
REGION_BYTES = {2: 64 << 20, 4: 32 << 20, 8: 16 << 20}
"""Default for one peer and slot: 128 to 224 MiB of workspace. Larger messages are sent in several calls."""

RECORDS = 8
"""Places for the ranks whose data a kernel gave up waiting for; behind them as many for waits that were ended."""

_NOTHING_SEEN = bytes(2 * RECORDS * 8)

ONE_SHOT, TWO_SHOT_REDUCE, TWO_SHOT_GATHER, LOW_PRECISION, ONE_SHOT_GATHER = range(1, 6)
_PHASES = {
    ONE_SHOT: "one-shot exchange",
    TWO_SHOT_REDUCE: "two-shot reduce-scatter",
    TWO_SHOT_GATHER: "two-shot all-gather",
    LOW_PRECISION: "fp8 exchange",
    ONE_SHOT_GATHER: "all-gather",
}
"""What a kernel was waiting for, as its records number it."""


class P2PUnavailable(CommError):
    """This group cannot use GPU peer-to-peer memory; the text names every rank that cannot and its reason."""


@dataclass(frozen=True)
class _Export:
    """What a rank tells the others about its buffer."""

    host: str
    process: int
    device: int
    address: int
    handle: bytes
    region_bytes: int

    def shares_device(self, other: "_Export") -> bool:
        return (self.host, self.process, self.device) == (other.host, other.process, other.device)


def host_identity() -> str:
    """Equal on two processes exactly when they can open each other's CUDA handles: same kernel, same IPC namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/ipc')}"


class Workspace:
    """One rank's buffer and its view of the peers' buffers.

    slots     addresses, valid on this device, of every rank's slots, in group order
    abort     address of this rank's abort word: nonzero ends all waits of this rank's kernels
    counters  int32 tensor, the call number (one_shot.py)
    records   pinned int64 tensor: what this rank waited for when a rank did not come, or its wait was ended
    sharers   ranks on this device, this one counted: more than one only where ranks are threads of a process
    """

    def __init__(self, bootstrap: "Communicator", device: int | None = None, region_bytes: int | None = None):
        """Called by every rank of `bootstrap`, which serves only to exchange handles. Raises P2PUnavailable alike.

        device        this rank's GPU; None: the current one
        region_bytes  for one peer and slot; None: REGION_BYTES
        """
        self.rank, self.size, self.ranks = bootstrap.rank, bootstrap.size, tuple(bootstrap.ranks)
        self.device = -1 if device is None else device
        self.region_bytes = region_bytes or REGION_BYTES.get(self.size, 0)
        self.failure: CommError | None = None
        self._base = 0
        self._opened: dict[int, int] = {}
        export = self._agree(bootstrap, self._allocate)
        exports = bootstrap.all_gather_object(export)
        addresses = self._agree(bootstrap, lambda: self._open(exports))
        self.slots = tuple(address + HEADER_BYTES for address in addresses)
        self.peer_aborts = tuple(addresses)
        self.abort = self._base
        self.sharers = sum(export.shares_device(exports[self.rank]) for export in exports)
        self._agree(bootstrap, self._make_tensors)  # past it all are armed: every rank may push

    def _agree(self, bootstrap: "Communicator", step):
        """Result of `step` if it succeeded on every rank; else P2PUnavailable on every rank."""
        result, reason = None, None
        try:
            result = step()
        except Exception as error:  # whatever stops one rank must reach all, or they wait for it
            reason = str(error)
        reasons = bootstrap.all_gather_object(reason)
        if any(reasons):
            self._release()
            raise P2PUnavailable("GPU peer-to-peer is not available: " + self._told(reasons))
        return result

    def _told(self, reasons: Sequence[str | None]) -> str:
        """Each reason once, with the ranks that gave it."""
        ranks: dict[str, list[str]] = {}
        for rank, text in zip(self.ranks, reasons, strict=True):
            if text:
                ranks.setdefault(text, []).append(str(rank))
        return "; ".join(f"rank {', '.join(each)}: {text}" for text, each in ranks.items())

    def _allocate(self) -> _Export:
        if importlib.util.find_spec("triton") is None:
            raise ValueError("the package triton, which compiles the kernels, is not installed")
        if self.size not in (2, 4, 8):
            raise ValueError(f"a group of {self.size} ranks; the kernels are built for 2, 4 and 8")
        if self.region_bytes < 4096 or self.region_bytes % 4096:
            raise ValueError(f"region_bytes {self.region_bytes} is not a positive multiple of 4096")
        if self.device < 0:
            self.device = torch.cuda.current_device()
        capability = torch.cuda.get_device_capability(self.device)
        if capability[0] not in _CAPABILITIES:
            raise ValueError(
                f"a GPU of compute capability {capability[0]}.{capability[1]}; the kernels are built for 9.x and 10.x"
            )
        size = HEADER_BYTES + SLOTS * (self.size - 1) * self.region_bytes
        size = (size + _GRAIN - 1) // _GRAIN * _GRAIN
        self._base = cuda.malloc(size, self.device)
        cuda.fill(self._base, 0xFF, size, self.device)
        cuda.fill(self._base, 0, HEADER_BYTES, self.device)
        return _Export(
            host=host_identity(),
            process=os.getpid(),
            device=self.device,
            address=self._base,
            handle=cuda.share(self._base, self.device),
            region_bytes=self.region_bytes,
        )

    def _make_tensors(self) -> None:
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=torch.device("cuda", self.device))
        self.records = torch.zeros(2 * RECORDS, dtype=torch.int64, device="cpu", pin_memory=True)
        self._seen = self.records.numpy()
        # Made now: pinning memory and creating streams may wait for the device, which an abort finds busy.
        self._one = torch.ones(1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._abort_stream = torch.cuda.Stream(self.device)
        torch.cuda.synchronize(self.device)

    def _open(self, exports: Sequence[_Export]) -> list[int]:
        return [self._base if r == self.rank else self._open_peer(r, export) for r, export in enumerate(exports)]

    def _open_peer(self, peer: int, export: _Export) -> int:
        mine = host_identity()
        if export.host != mine:
            raise CommError(f"rank {self.ranks[peer]} runs on another host or in another container ({export.host})")
        if export.region_bytes != self.region_bytes:
            raise CommError(f"region_bytes {self.region_bytes} here, {export.region_bytes} on rank {self.ranks[peer]}")
        if export.process == os.getpid():  # a rank that is a thread of this process: CUDA refuses its handle
            cuda.enable_peer_access(self.device, export.device)
            return export.address
        self._opened[peer] = cuda.open_shared(export.handle, self.device)
        return self._opened[peer]

    def on_device(self):
        """Context in which launches go to this rank's GPU."""
        return on_device(self.device)

    def synchronize(self) -> None:
        """Wait for what the current stream was given."""
        torch.cuda.current_stream(self.device).synchronize()

    def check(self) -> None:
        """Raise CollectiveTimeout if a kernel of this rank ever gave up waiting, CommError if a peer ended its wait."""
        if self.failure is None and self._seen.tobytes() != _NOTHING_SEEN:  # each call asks: `any` takes 2 us
            self.failure = self._describe()
        if self.failure is not None:
            raise self.failure

    def _describe(self) -> CommError:
        late = self._waits(self._seen[:RECORDS])
        where = f"GPU peer-to-peer memory, rank {self.ranks[self.rank]} of group {self.ranks}"
        if not late:
            ended = self._waits(self._seen[RECORDS:])
            return CommError(f"{where}: aborted by a rank of the group; " + "; ".join(ended.values()))
        return CollectiveTimeout(f"{where}: " + "; ".join(late.values()), tuple(late))

    def _waits(self, records) -> dict[int, str]:
        """By world rank of the sender: which wait, in words."""
        return {
            self.ranks[
                r
            ]: f"call {value & 0x7FFFFFFF} ({_PHASES[value >> 32]}) never received rank {self.ranks[r]}'s data"
            for r, value in enumerate(map(int, records))
            if value
        }

    def stop_waits(self) -> None:
        """End the waits of all ranks' kernels, running ones included; the workspace is unusable afterwards."""
        for address in self.peer_aborts:
            cuda.copy(address, self._one.data_ptr(), 4, self._abort_stream)
        self._abort_stream.synchronize()

    def close(self) -> None:
        """Give the memory back, unless a wait gave up: a peer that comes late would still write into it.

        Otherwise every word that a peer sent here has been taken, so no peer is still writing.
        """
        if self._base:
            torch.cuda.synchronize(self.device)
            with contextlib.suppress(CommError):
                self.check()
            if self.failure is None:
                self._release()

    def _release(self) -> None:
        for address in self._opened.values():
            cuda.close_shared(address, self.device)
        self._opened.clear()
        if self._base:
            cuda.free(self._base, self.device)
            self._base = 0
