"""Which strategy and launch for which call.

Worlds 2 and 4 are what won sweeps of launches on two and four H200 and comparisons in turn (NVLink, CUDA graphs, bf16),
benchmarks/gpu_all_reduce.md.
World 8 is not measured: launches that compile without spilling registers, and one-shot up to the size up to which
others' one-stage all-reduce of the same shape is published to win on Hopper, a quarter MiB.
"""

import functools
from dataclasses import dataclass

import torch

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
KIB, MIB = 1 << 10, 1 << 20
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Tuning:
    """How a kernel is launched; the result does not depend on it."""

    strategy: str
    """ONESHOT or TWOSHOT."""
    warps: int
    ahead: int = 0
    """One-shot: rows that a block pushes before it awaits its first."""
    blocks_per_sm: int = 1
    lanes: int = 512
    """Chunks of a row, when the call may choose (plain)."""
    bulk: bool = False
    """Push by bulk copies from shared memory, where rows are aligned and AHEAD + 1 of them (two-shot: 2) fit there."""
    registers: int = 0
    """Of a thread at most, where it has one aligned chunk of a row; 0: as the compiler likes. With 32 a
    multiprocessor holds as many threads as it can, and rows wait for the link side by side, not behind each other."""
    pushers: int = 0
    """Two-shot: blocks that push contributions, while the others sum and finish."""
    pausing: int = 0
    """Nanoseconds between two looks for what has not arrived: fewer looks leave more of the cache to what arrives."""


@dataclass(frozen=True)
class Choice:
    """`tuning` None: leave the call to the fallback group (NCCL)."""

    tuning: Tuning | None
    reason: str


@dataclass(frozen=True)
class _Entry:
    up_to: int
    """Bytes of the tensor on one rank."""
    tuning: Tuning | None
    measured: str


_PLAIN_2 = (
    _Entry(512 * KIB, Tuning("ONESHOT", warps=8, blocks_per_sm=4, lanes=256), "16 KiB 2.4 us, NCCL 9.6"),
    _Entry(2 * MIB, Tuning("ONESHOT", warps=16, blocks_per_sm=4), "1 MiB 5.2 us, NCCL 16.5"),
    _Entry(
        _NO_LIMIT,
        Tuning("ONESHOT", warps=32, ahead=1, lanes=1024, bulk=True, pausing=64),
        "4 MiB 15.2 us, NCCL 34.8; 64 MiB 196 us, NCCL 251",
    ),
)
_FUSED_2 = (
    _Entry(
        256 * KIB,
        Tuning("ONESHOT", warps=32, ahead=1, bulk=True),
        "4 x 4096 2.9 us, NCCL + norm 11.1; 16 x 7168 4.0 us, 12.8",
    ),
    _Entry(
        MIB,
        Tuning("ONESHOT", warps=32, ahead=1, bulk=True, pausing=64),
        "64 x 7168 5.9 us, NCCL + norm 17.7",
    ),
    _Entry(
        _NO_LIMIT,
        Tuning("ONESHOT", warps=32, blocks_per_sm=4, registers=32, pausing=64),
        "256 x 7168 15 us, NCCL + norm 38; 1024 x 7168 46 us, 87; 4096 x 7168 173 us, 289",
    ),
)
_TWO_SHOT = Tuning("TWOSHOT", warps=16, blocks_per_sm=2, bulk=True, registers=64, pushers=96, pausing=64)
_PLAIN_4 = (
    _Entry(64 * KIB, Tuning("ONESHOT", warps=4, blocks_per_sm=4, lanes=128), "16 KiB 3.0 us, NCCL 13.8"),
    _Entry(128 * KIB, Tuning("ONESHOT", warps=16, blocks_per_sm=2), "256 KiB 5.4 us, two-shot 5.0"),
    _Entry(
        512 * KIB,
        Tuning("TWOSHOT", warps=8, blocks_per_sm=4, lanes=256, registers=64, pushers=192, pausing=64),
        "256 KiB 5.0 us, one-shot 5.4; 512 KiB 6.0 us, 7.8",
    ),
    _Entry(64 * MIB, _TWO_SHOT, "1 MiB 8.2 us, NCCL 20.5; 4 MiB 24 us, 44; 16 MiB 80 us, 99; 64 MiB 312 us, 331"),
    _Entry(_NO_LIMIT, None, "256 MiB 1194 us, two-shot not measured"),
)
_FUSED_4 = (
    _Entry(
        256 * KIB,
        Tuning("ONESHOT", warps=32, ahead=1, bulk=True),
        "1 x 7168 4.8 us, NCCL + norm 15.6; 16 x 7168 6.4 to 7.6 us, 16.9, two-shot 7.6",
    ),
    _Entry(
        2 * MIB,
        Tuning("TWOSHOT", warps=32, blocks_per_sm=2, registers=64, pushers=192, pausing=64),
        "64 x 7168 8.8 us, one-shot 12.2, NCCL + norm 22.6; 128 x 7168 13.8 us; 256 x 4096 15 us",
    ),
    _Entry(
        4 * MIB,
        Tuning("TWOSHOT", warps=16, pushers=81, pausing=64),
        "256 x 7168 24 us, NCCL + norm 48",
    ),
    _Entry(
        64 * MIB,
        Tuning("TWOSHOT", warps=16, bulk=True, pushers=48, pausing=64),
        "1024 x 7168 74 us, NCCL + norm 110; 4096 x 7168 273 us, 358",
    ),
    _Entry(_NO_LIMIT, None, "not measured"),
)
_UNMEASURED = "not measured at this world size"
_BOTH_8 = (
    _Entry(256 * KIB, Tuning("ONESHOT", warps=8, blocks_per_sm=2), _UNMEASURED),
    _Entry(16 * MIB, _TWO_SHOT, _UNMEASURED),
    _Entry(_NO_LIMIT, None, _UNMEASURED),
)
_ENTRIES = {
    (2, False): _PLAIN_2,
    (2, True): _FUSED_2,
    (4, False): _PLAIN_4,
    (4, True): _FUSED_4,
    (8, False): _BOTH_8,
    (8, True): _BOTH_8,
}


GATHER = Tuning("ONESHOT", warps=8, blocks_per_sm=4, lanes=256)
_GATHERS = {
    2: (4 * MIB, "4 MiB 28 us, NCCL 36; 8 MiB 56, NCCL 54"),
    4: (512 * KIB, _UNMEASURED),
    8: (512 * KIB, _UNMEASURED),
}
"""By ranks: bytes of a rank's tensor up to which gathers are ours."""


def choose_gather(world: int, nbytes: int) -> Choice:
    """For a tensor of `nbytes` on every rank, which the kernel sends as twice as many."""
    limit, measured = _GATHERS[world]
    if nbytes > limit:
        return Choice(None, f"serves parts of more than {limit // KIB} KiB: {measured}")
    return Choice(GATHER, f"ONESHOT for parts of up to {limit // KIB} KiB: {measured}")


@functools.lru_cache(maxsize=4096)
def choose(world: int, nbytes: int, fused: bool, strategy: str) -> Choice:
    """For a tensor of `nbytes` a rank. `strategy`: AUTO, MIN_LATENCY (never NCCL), ONESHOT or TWOSHOT."""
    entries = _ENTRIES[world, fused]
    if strategy != "AUTO":
        entries = tuple(
            entry for entry in entries if entry.tuning and strategy in ("MIN_LATENCY", entry.tuning.strategy)
        )
    entry = next((entry for entry in entries if nbytes <= entry.up_to), entries[-1] if entries else None)
    if entry is None:  # TWOSHOT at world 2, where it sends as many bytes as one-shot and waits twice
        return Choice(_TWO_SHOT, "TWOSHOT, asked for by name")
    name = entry.tuning.strategy if entry.tuning else "NCCL"
    limit = "any size above" if entry.up_to == _NO_LIMIT else f"up to {entry.up_to // KIB} KiB"
    return Choice(entry.tuning, f"{name} for {limit}: {entry.measured}")
