"""The peer-to-peer communicator on CPU memory that processes share, its kernels in Triton's interpreter."""

import contextlib
import ctypes
import time
from pathlib import Path

import conformance as cases
import p2p_checks
import pytest
import torch
from quick_interpreter import make_quick

from shardwise.comm.arguments import as_bytes
from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.p2p import launch
from shardwise.comm.p2p.communicator import P2PCommunicator
from shardwise.comm.p2p.gather import gather
from shardwise.comm.p2p.launch import Launcher
from shardwise.comm.p2p.table import Tuning
from shardwise.comm.p2p.workspace import COUNTERS, HEADER_BYTES, RECORDS, SLOTS, P2PUnavailable, Workspace
from shardwise.comm.rank import RankInfo
from shardwise.comm.strategy import create, make_groups
from shardwise.comm.watch import Deadlines
from shardwise.sharding.layout import ParallelLayout

make_quick()
REGION = 1 << 15


class SharedWorkspace(Workspace):
    """Every rank's buffer is a file that all ranks map."""

    def __init__(self, fallback, folder: str):
        self.rank, self.size, self.ranks = fallback.rank, fallback.size, fallback.ranks
        self.region_bytes = REGION
        self.failure = None
        words = (HEADER_BYTES + SLOTS * (self.size - 1) * REGION) // 4
        self.memory = [
            torch.from_file(str(Path(folder) / f"rank{rank}"), shared=True, size=words, dtype=torch.int32)
            for rank in range(self.size)
        ]
        self.memory[self.rank].fill_(-1)
        self.memory[self.rank][: HEADER_BYTES // 4] = 0
        self.peer_aborts = tuple(memory.data_ptr() for memory in self.memory)
        self.slots = tuple(address + HEADER_BYTES for address in self.peer_aborts)
        self.abort = self.peer_aborts[self.rank]
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32)
        self.records = torch.zeros(2 * RECORDS, dtype=torch.int64)
        self._seen = self.records.numpy()
        fallback.all_gather_object(None)

    def on_device(self):
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def stop_waits(self) -> None:
        for address in self.peer_aborts:
            ctypes.c_int32.from_address(address).value = 1

    def close(self) -> None:
        pass

    def all_armed(self) -> bool:
        return bool(self.memory[self.rank][HEADER_BYTES // 4 :].eq(-1).all())


class InterpretedLauncher(Launcher):
    side_by_side = False

    def __init__(self, workspace: SharedWorkspace):
        self.workspace, self.deadline_ns, self.multiprocessors, self.pdl = workspace, 60 * 10**9, 2, False
        self._kernels, self._kept, self._places = {}, {}, launch.places(workspace)

    def _compiled(self, kernel, positional, options):
        return launch.Ready(kernel, options, (), resident=3)

    def _start(self, ready, grid, tensors, numbers, addresses=None) -> None:
        if ready.kernel is gather:
            tensors = map(as_bytes, tensors)
        ready.kernel[(grid,)](*tensors, *self._places, *numbers, **ready.options)


class OnCpu(P2PCommunicator):
    devices = ("cpu",)


class OnHosts(OnCpu):
    """On hosts of two ranks each."""

    folder: Path

    @classmethod
    def connect(cls, fallback, *, region_bytes=None) -> "OnHosts":
        far = [rank for rank in fallback.ranks if rank // 2 != fallback.ranks[fallback.rank] // 2]
        reasons = fallback.all_gather_object(f"rank {far[0]} runs on another host" if far else None)
        if fallback.size != 2 or any(reasons):
            raise P2PUnavailable(next(filter(None, reasons), "the kernels are built for 2, 4 and 8"))
        place = cls.folder / fallback.name.replace("/", "-")
        place.mkdir(exist_ok=True)
        workspace = SharedWorkspace(fallback, str(place))
        group = cls(fallback, workspace, InterpretedLauncher(workspace))
        group.test_links()
        return group


def join(fallback, folder: str) -> OnCpu:
    workspace = SharedWorkspace(fallback, folder)
    group = OnCpu(fallback, workspace, InterpretedLauncher(workspace))
    group.test_links()
    return group


CASES = [
    (torch.bfloat16, (5, 96)),
    (torch.bfloat16, (2, 51)),
    (torch.bfloat16, (1, 8)),
    (torch.float16, (3, 64)),
    (torch.float32, (9, 24)),
]


def conformance(info: RankInfo, store, folder: str) -> None:
    group = join(create(info, store=store), folder)
    few = info.world > 2  # these ranks are more than the cores
    p2p_checks.check_sums(group, CASES[:2] if few else CASES, ("ONESHOT", "TWOSHOT"))
    p2p_checks.check_fused(group, CASES[:1] if few else CASES, ("ONESHOT", "TWOSHOT"))
    if not few:
        p2p_checks.check_pieces(group)
        p2p_checks.check_low_precision(group, (2003,), (torch.bfloat16,), in_place=False)
    p2p_checks.check_gathers(group)
    p2p_checks.check_repeats(group)
    check_variants(group)
    group.barrier()
    assert group.workspace.all_armed(), "every word that was pushed was taken and armed again"
    cases.integers_wrap_around(group)
    cases.fused_norms(group)
    assert " us, NCCL " in group.explain("all_reduce", 1 << 14) or info.world > 2
    assert group.explain("all_gather", 1 << 14).startswith("ONESHOT")
    assert group.explain("all_gather", 1 << 24).startswith(f"{group.fallback.transport} serves parts of more than")


def check_variants(group: OnCpu) -> None:
    """How rows are pushed changes no bit, also where results replace inputs."""
    parts = p2p_checks.everyones(group.size, (300,), torch.float32, 9)
    for variant in (
        Tuning("ONESHOT", 1, 2, lanes=32),
        Tuning("ONESHOT", 1, 1, lanes=32, bulk=True),
        Tuning("TWOSHOT", 1, lanes=32, pushers=1),
        Tuning("TWOSHOT", 1, blocks_per_sm=2, lanes=32, bulk=True, pushers=5),
    ):
        x = parts[group.rank].clone()
        for out in (torch.empty_like(x), x):
            group.launcher.all_reduce(x, out, variant)
            group.synchronize()
            assert torch.equal(out, p2p_checks.rounded_sum(parts))


def several_hosts(info: RankInfo, store, folder: str) -> tuple[str, str]:
    """Two hosts of two ranks. Every group sums what it should; what moves the bytes, and why the world's."""
    OnHosts.folder = Path(folder)
    world = OnHosts.or_fallback(create(info, store=store, transport="gloo", check=True))
    groups = make_groups(world, ParallelLayout(tp=2, attn_dp=2))
    assert groups.tp.explain("all_reduce", 1 << 14) != world.explain("all_reduce", 1 << 14)
    for group in (world, groups.tp, groups.attn_dp, groups.tp.split(0, key=-info.rank), world.split(0, key=-info.rank)):
        parts = p2p_checks.everyones(4, (3, 64), torch.bfloat16, 5)
        mine, theirs = parts[info.rank], [parts[rank] for rank in group.ranks]
        assert torch.equal(group.all_reduce(mine), p2p_checks.rounded_sum(theirs))
        _, stream = group.all_reduce_residual_rms_norm(mine, mine, torch.ones(64).bfloat16(), 1e-5)
        assert torch.equal(stream, p2p_checks.rounded_sum(theirs) + mine)
        assert torch.equal(group.all_gather(mine), torch.cat(theirs))
        assert group.all_gather_object(info.rank) == list(group.ranks)
    told = groups.transports, world.why()
    world.barrier()
    if info.rank % 2:
        time.sleep(0.3)
        world.abort("enough")
    else:  # in a wait on the device, of a group split off the one that is aborted
        groups.tp.check = False
        groups.tp.all_reduce(torch.ones(64))
        with pytest.raises(CommError, match="aborted by a rank of the group"):
            groups.tp.synchronize()
    return told


def faults(info: RankInfo, store, folder: str) -> None:
    """One after another, each on memory of its own."""
    fallback = create(info, store=store)
    for fault in (missing_rank, aborted, broken_links):
        place = Path(folder, fault.__name__)
        place.mkdir(exist_ok=True)
        fault(info, fallback, str(place))
        fallback.barrier()


def missing_rank(info: RankInfo, fallback, folder: str) -> None:
    """Rank 1 stays away from the second call; rank 0 learns so at the next synchronisation and stays broken."""
    group = join(fallback, folder)
    x = torch.ones(64)
    group.workspace.counters.fill_(2**31 - 1)  # the number of the last call before it starts anew
    group.all_reduce(x, strategy="TWOSHOT")
    group.synchronize()
    if info.rank == 0:
        group.deadlines = Deadlines(collective=0.3)
        begun = time.monotonic()
        out = group.all_reduce(x, strategy="ONESHOT")
        with pytest.raises(
            CollectiveTimeout, match=r"call 0 \(one-shot exchange\) never received rank 1's data"
        ) as caught:
            group.synchronize()
        assert caught.value.missing == (1,)
        assert time.monotonic() - begun < 5
        assert out.isnan().all(), "what did not arrive is not a number"
        for strategy in ("AUTO", "TWOSHOT"):  # of a layout that is new, and of one that was called before
            with pytest.raises(CommError, match="never received rank 1"):
                group.all_reduce(x, strategy=strategy)


def aborted(info: RankInfo, fallback, folder: str) -> None:
    group = join(fallback, folder)
    if info.rank == 0:
        group.all_gather(torch.ones(64))
        with pytest.raises(
            CommError, match=r"aborted by a rank of the group; call \d+ \(all-gather\) never received rank 1's"
        ):
            group.synchronize()
    else:
        time.sleep(0.5)
        group.workspace.stop_waits()


def broken_links(info: RankInfo, fallback, folder: str) -> None:
    """A link that loses data, then one that changes it: every rank refuses, with the link's name."""

    class LossyLauncher(InterpretedLauncher):
        def __init__(self, workspace, fault):
            super().__init__(workspace)
            self.fault = fault
            if fault == "nothing":
                self.deadline_ns = 3 * 10**8

        def all_reduce(self, x, out, tuning, *, launch=True):
            if not launch or self.workspace.rank == 0:
                super().all_reduce(x, out, tuning, launch=launch)
            elif self.fault == "wrong data":
                super().all_reduce(x + 1, out, tuning)

    for fault, text in (
        ("wrong data", "rank 0 received wrong data from rank 1"),
        ("nothing", "rank 0 received nothing"),
    ):
        Path(folder, fault).mkdir(exist_ok=True)
        workspace = SharedWorkspace(fallback, str(Path(folder, fault)))
        with pytest.raises(P2PUnavailable, match=text):
            OnCpu(fallback, workspace, LossyLauncher(workspace, fault)).test_links()
