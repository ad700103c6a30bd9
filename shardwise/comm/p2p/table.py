"""Which strategy and launch for which call, from benchmarks/results/gpu_all_reduce.json (2x H200, NVLink, bf16)."""

from dataclasses import dataclass

from shardwise.comm.p2p.launch import Tuning

MIB = 1 << 20


@dataclass(frozen=True)
class Choice:
    """`tuning` None: leave the call to the group beyond (NCCL)."""

    tuning: Tuning | None
    reason: str


@dataclass(frozen=True)
class _Entry:
    up_to: int
    """Bytes of the tensor on one rank."""
    tuning: Tuning | None
    measured: str


def _pick(entries: tuple[_Entry, ...], nbytes: int) -> Choice:
    entry = next((entry for entry in entries if nbytes <= entry.up_to), entries[-1])
    name = entry.tuning.strategy if entry.tuning else "NCCL"
    return Choice(entry.tuning, f"{name} up to {entry.up_to / MIB:g} MiB: {entry.measured}")


_PLAIN_2 = (
    _Entry(512 << 10, Tuning("ONESHOT", warps=8, lanes=256), "not measured yet"),
    _Entry(1 << 40, Tuning("ONESHOT", warps=16, blocks_per_sm=4), "not measured yet"),
)
_FUSED_2 = (
    _Entry(2 * MIB, Tuning("ONESHOT", warps=8, blocks_per_sm=4), "not measured yet"),
    _Entry(1 << 40, Tuning("ONESHOT", warps=16, blocks_per_sm=2, registers=64), "not measured yet"),
)


def choose(world: int, nbytes: int, fused: bool, strategy: str) -> Choice:
    """For a tensor of `nbytes` a rank. `strategy`: AUTO, MIN_LATENCY, ONESHOT or TWOSHOT."""
    if strategy == "TWOSHOT":
        return Choice(Tuning("TWOSHOT", warps=8, ahead=2, blocks_per_sm=2), "asked for by name")
    choice = _pick(_FUSED_2 if fused else _PLAIN_2, nbytes)
    if strategy == "ONESHOT":
        return Choice(choice.tuning, "asked for by name")
    return choice
