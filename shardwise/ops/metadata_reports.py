"""Bad metadata that only a kernel sees: it leaves a report, which the operator's next call raises.

Slots, bounds and positions of a step lie in device memory, and looking at them on the host would wait for the device.
A kernel that meets a bad entry leaves it out and stores what it saw in its operator's word of host memory: a store that
good metadata never reaches. It works inside of CUDA graphs, whose replays call no operator: `raise_reports` may be
called by itself. On the CPU, and with SHARDWISE_CHECK_METADATA=1, which waits for the device at every call, metadata is
read before anything is launched.
"""

import ctypes
import functools
import os
from typing import NamedTuple

import torch

from shardwise.ops.triton_support import tl, triton

SLOT, BOUNDS, LENGTHS, PLACE = (tl.constexpr(kind) for kind in (1, 2, 3, 4))
_COMPLAINTS = {
    1: "slot_idx holds {value} for sequence {sequence}; legal: -1 (skipped) to the last slot of the cache",
    2: "cu_seqlen holds {value} at the end of sequence {sequence}; it must ascend from 0 to the prefill tokens",
    3: "seq_len of the prefill sequences adds up to {value}, which batch_info_host does not count",
    4: "input_pos {value} and seq_len of sequence {sequence} leave the cache",
}
# Whether CUDA tensors' metadata is read before the launch, as CPU tensors' is.
AT_ONCE = {False, True} if os.environ.get("SHARDWISE_CHECK_METADATA") == "1" else {False}


class _Report(NamedTuple):
    word: torch.Tensor
    """int64 [1] in host memory that kernels reach, at an address that is a multiple of 16; 0: nothing to tell"""
    seen: ctypes.c_int64
    """The same memory, which is read within 0.1 µs this way"""


_reports: dict[str, _Report] = {}


@functools.cache
def _report_of(op: str) -> _Report:
    memory = torch.zeros(2, dtype=torch.int64, pin_memory=torch.cuda.is_available())
    made = _Report(memory[:1], ctypes.c_int64.from_address(memory.data_ptr()))
    return _reports.setdefault(op, made)  # another thread may be here too: all kernels write into one word


def report_word(op: str) -> torch.Tensor:
    """Where kernels of the operator `op` store a report."""
    return _report_of(op).word


def raise_report(op: str) -> None:
    """Raise ValueError if a kernel of an earlier call of `op` met bad metadata and has ended; once."""
    seen = _report_of(op).seen
    if seen.value:
        word, seen.value = seen.value, 0
        kind, sequence, value = word >> 56, word >> 32 & 0xFFFFFF, ctypes.c_int32(word & 0xFFFFFFFF).value
        complaint = _COMPLAINTS[kind].format(sequence=sequence, value=value)
        raise ValueError(f"{op}: in an earlier call {complaint} (SHARDWISE_CHECK_METADATA=1 raises in that call)")


def raise_reports() -> None:
    """`raise_report` for every operator; synchronise the device first to be sure of all reports."""
    for op in list(_reports):
        raise_report(op)


def read_at_once(tensor: torch.Tensor) -> bool:
    """Whether metadata beside `tensor` is to be read before the launch; inside of a graph's capture it cannot be."""
    return tensor.is_cuda in AT_ONCE and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def looks_first(op: str, tensor: torch.Tensor) -> bool:
    """Whether a call of `op` has a report to raise, or metadata beside `tensor` to read before the launch."""
    return _report_of(op).seen.value != 0 or read_at_once(tensor)


@triton.jit
def report(word_ptr, bad, KIND: tl.constexpr, sequence, value):
    """Where `bad`: tell of `sequence` and of `value`, cut to 32 bits. Scalars or blocks; one of many reports stays."""
    value = tl.minimum(tl.maximum(value.to(tl.int64), -(2**31)), 2**31 - 1) & 0xFFFFFFFF
    told = (sequence.to(tl.int64) & 0xFFFFFF) << 32 | value | (KIND << 56)
    tl.store(word_ptr + sequence * 0, told, mask=bad)


@triton.jit
def check_slots(word_ptr, exists, sequence, slot, slots):
    """Report slots that are neither -1 nor in the cache."""
    report(word_ptr, exists & ((slot < -1) | (slot >= slots)), SLOT, sequence, slot)


@triton.jit
def check_bounds(word_ptr, bounds_ptr, sequence, sequences, tokens):
    """Report the bounds of sequences that do not ascend, or do not begin or end with the prefill tokens."""
    exists = sequence < sequences
    low = tl.load(bounds_ptr + sequence, mask=exists, other=0)
    high = tl.load(bounds_ptr + sequence + 1, mask=exists, other=0)
    ends = ((sequence == 0) & (low != 0)) | ((sequence == sequences - 1) & (high != tokens))
    report(word_ptr, exists & ((low > high) | ends), BOUNDS, sequence, high)
