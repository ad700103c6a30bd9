"""Sequences of one step for operators that keep a state per sequence (SSM, convolution, delta rule).

Tokens are flat: prefill sequences first, then one token of each decode sequence, then padding.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.attention.batch import Batch, read_integers
from shardwise.ops.metadata_reports import raise_report, read_at_once
from shardwise.ops.triton_support import tl, triton


@dataclass(frozen=True)
class StateSpan:
    """One sequence's flat tokens [start, start + length), its state row, and whether it continues from that state."""

    start: int
    length: int
    slot: int
    """-1: a padding sequence, skipped."""
    resumes: bool


def read_state_spans(
    op: str,
    batch: Batch,
    tokens: int,
    cu_seqlen: torch.Tensor,  # int [prefill] or [prefill + 1 and more]
    slot_idx: torch.Tensor,  # int [sequences and more]
    use_initial_states: torch.Tensor | None,  # bool [prefill and more]; decode always resumes
    slots: int,
) -> list[StateSpan]:
    """The sequences of a step from metadata on the host. Raises ValueError for counts that contradict each other."""
    check_counts(op, batch, tokens, slot_idx, use_initial_states)
    bounds = prefill_bounds(op, batch, cu_seqlen)
    rows = read_integers(op, "slot_idx", slot_idx, batch.sequences)
    wrong = [slot for slot in rows if not -1 <= slot < slots]
    if wrong:
        raise ValueError(f"{op}: slot_idx holds {wrong[0]}; the state cache has {slots} slots, -1 skips a sequence")
    resumes = use_initial_states[: batch.prefill].tolist() if batch.prefill and use_initial_states is not None else []
    resumes = (resumes or [False] * batch.prefill) + [True] * batch.decode
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)] + [1] * batch.decode
    starts = bounds[:-1] + list(range(batch.prefill_tokens, batch.tokens))
    return [StateSpan(*one) for one in zip(starts, lengths, rows, resumes, strict=True)]


def check_metadata(
    op: str,
    batch: Batch,
    x: torch.Tensor,  # [b, s, ...]
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    cache: torch.Tensor,  # [slots, ...]
) -> None:
    """Raise ValueError for what kernels of earlier calls reported and, where that does not wait, for bad metadata."""
    raise_report(op)
    if read_at_once(cache):
        read_state_spans(op, batch, x.shape[:2].numel(), cu_seqlen, slot_idx, use_initial_states, cache.shape[0])


def prefill_bounds(op: str, batch: Batch, cu_seqlen: torch.Tensor | None) -> list[int]:
    """Token bounds of the prefill sequences, prefill + 1 numbers; the last may be missing in `cu_seqlen`."""
    if not batch.prefill:
        return [0]
    count = 0 if cu_seqlen is None else min(cu_seqlen.numel(), batch.prefill + 1)
    bounds = read_integers(op, "cu_seqlen", cu_seqlen, count)
    if len(bounds) == batch.prefill:
        bounds.append(batch.prefill_tokens)
    ascending = all(a <= b for a, b in zip(bounds, bounds[1:], strict=False))
    if len(bounds) != batch.prefill + 1 or bounds[0] != 0 or not ascending or bounds[-1] != batch.prefill_tokens:
        raise ValueError(
            f"{op}: cu_seqlen begins {bounds}; it must ascend from 0 to the {batch.prefill_tokens} prefill tokens "
            f"of {batch.prefill} sequences"
        )
    return bounds


@triton.jit
def load_bounds(pointers, mask, tokens):
    """Entries of cu_seqlen as numbers from 0 to `tokens`, which they are where it was made well; 0 where masked.

    Kernels cannot refuse what they find in device memory: whatever stands there must lead to tokens.
    """
    return tl.minimum(tl.maximum(tl.load(pointers, mask=mask, other=0), 0), tokens)


def check_counts(
    op: str, batch: Batch, tokens: int, slot_idx: torch.Tensor, use_initial_states: torch.Tensor | None
) -> None:
    """Checks that need no look at device memory."""
    if batch.tokens > tokens:
        raise ValueError(f"{op}: batch_info_host counts {batch.tokens} tokens, the input holds {tokens}")
    if slot_idx.numel() < batch.sequences:
        raise ValueError(f"{op}: slot_idx has {slot_idx.numel()} entries for {batch.sequences} sequences")
    if use_initial_states is not None and use_initial_states.numel() < batch.prefill:
        raise ValueError(
            f"{op}: use_initial_states has {use_initial_states.numel()} entries for {batch.prefill} prefill sequences"
        )


def token_rows(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`t` [b, s, ...] with a contiguous last dimension, and the stride from token to token.

    No copy where the last dimension is contiguous and only one of b and s exceeds 1, as in every flat batch.
    """
    strides, shape = t.stride(), t.shape
    if strides[-1] != 1 or (shape[0] != 1 and shape[1] != 1):
        t = t.contiguous()
        strides = t.stride()
    return t, strides[0] if shape[1] == 1 else strides[1]
