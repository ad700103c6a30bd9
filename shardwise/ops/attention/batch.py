"""The shape of one step's batch: which flat tokens belong to which sequence, and where its cache continues.

A batch is flattened to T tokens: prefill sequences first, then one token for each decode sequence, then padding.
Metadata tensors may be longer than the batch; entries beyond its sequences are ignored.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


class Batch(NamedTuple):
    """Counts of one step. Extend (speculative) sequences count as prefill: both bring several tokens."""

    prefill: int
    prefill_tokens: int
    decode: int

    @property
    def sequences(self) -> int:
        return self.prefill + self.decode

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode


class Counts(NamedTuple):
    """Sequences and tokens of a step by kind."""

    prefill: int
    prefill_tokens: int
    extend: int
    extend_tokens: int
    decode: int


def read_counts(op: str, batch_info_host: torch.Tensor) -> Counts:
    """Read `batch_info_host`, int [3] (prefill, prefill tokens, decode) or int [6+] (prefill, prefill tokens,
    extend, extend tokens, decode, decode tokens). It belongs on the host: on a CUDA device the read synchronises.
    """
    try:
        return _counts(op, tuple(batch_info_host.tolist()))
    except TypeError:  # no number at all, or lists of numbers, or no integers
        raise _not_counts(op, batch_info_host) from None


def _not_counts(op: str, batch_info_host: torch.Tensor) -> TypeError:
    came = f"{batch_info_host.dtype} {list(batch_info_host.shape)}"
    return TypeError(f"{op}: batch_info_host is {came}; legal: integers [3], or [6] and more")


@functools.lru_cache(maxsize=4096)
def _counts(op: str, info: tuple[int, ...]) -> Counts:
    if not all(isinstance(number, int) for number in info):  # 2.0 would be kept for calls that bring 2
        raise TypeError
    if len(info) == 3:
        counts = Counts(info[0], info[1], 0, 0, info[2])
    elif len(info) >= 6:
        counts = Counts(*info[:5])
    else:
        raise ValueError(f"{op}: batch_info_host has {len(info)} entries; legal: 3, or 6 and more")
    orphans = (counts.prefill_tokens and not counts.prefill) or (counts.extend_tokens and not counts.extend)
    if orphans or min(counts) < 0:
        raise ValueError(
            f"{op}: batch_info_host is {list(info)}; legal: counts >= 0, prefill tokens only with sequences"
        )
    return counts


def read_batch(op: str, batch_info_host: torch.Tensor) -> Batch:
    """The step that `batch_info_host` counts, see `read_counts`."""
    try:
        return _batch(op, tuple(batch_info_host.tolist()))
    except TypeError:
        raise _not_counts(op, batch_info_host) from None


@functools.lru_cache(maxsize=4096)
def _batch(op: str, info: tuple[int, ...]) -> Batch:
    counts = _counts(op, info)
    return Batch(counts.prefill + counts.extend, counts.prefill_tokens + counts.extend_tokens, counts.decode)


@dataclass(frozen=True)
class Span:
    """One sequence's part of a step: flat tokens [start, start + length), cache row `slot` filled up to `past`."""

    start: int
    length: int
    past: int
    slot: int

    @property
    def total(self) -> int:
        """Tokens in the cache after this step."""
        return self.past + self.length


def read_spans(
    op: str,
    batch: Batch,
    tokens: int,  # T, padding included
    seq_len: torch.Tensor | None,  # int [>= prefill]; decode sequences have length 1
    input_pos: torch.Tensor,  # int [>= sequences]
    slot_idx: torch.Tensor,  # int [>= sequences]
    cache_shape: tuple[int, ...],  # [slots, max_seq, ...]
) -> list[Span]:
    """The sequences of a step, from metadata that is read on the host (a CUDA tensor synchronises)."""
    if batch.tokens > tokens:
        raise ValueError(f"{op}: batch_info_host counts {batch.tokens} tokens, q holds {tokens}")
    count = batch.sequences
    positions = read_integers(op, "input_pos", input_pos, count)
    slots = read_integers(op, "slot_idx", slot_idx, count)
    lengths = read_integers(op, "seq_len", seq_len, batch.prefill) if batch.prefill else []
    if sum(lengths) != batch.prefill_tokens:
        raise ValueError(f"{op}: seq_len of the prefill sequences is {lengths}, batch_info_host counts "
                         f"{batch.prefill_tokens} prefill tokens; legal: an equal sum")  # fmt: skip
    spans, start = [], 0
    for length, past, slot in zip(lengths + [1] * batch.decode, positions, slots, strict=True):
        if not -1 <= slot < cache_shape[0]:
            raise ValueError(f"{op}: slot_idx holds {slot}; legal: -1 (padding) to {cache_shape[0] - 1}")
        if length < 0 or (slot >= 0 and not 0 <= past <= cache_shape[1] - length):
            raise ValueError(
                f"{op}: input_pos {past} + seq_len {length} leaves the cache of {cache_shape[1]} positions"
            )
        spans.append(Span(start, length, past, slot))
        start += length
    return spans


def read_integers(op: str, name: str, tensor: torch.Tensor | None, count: int) -> list[int]:
    """The first `count` entries of a tensor with an integer for each sequence; ValueError for another."""
    if count == 0:
        return []
    if tensor is None or tensor.dim() != 1 or tensor.numel() < count or tensor.dtype not in INTEGERS:
        came = "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{op}: {name} is {came}; legal: an integer for each of the {count} sequences")
    return tensor[:count].tolist()
