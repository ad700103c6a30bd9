"""The state-space scan with FlashInfer's decode step; prefill runs on our Triton kernels."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.kept import Kept, View, fresh, view
from shardwise.ops.mamba import ssd_kernels as kernels
from shardwise.ops.mamba.scan import Inputs
from shardwise.ops.mamba.ssm import Plan, like_hidden, run_step
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import FLASHINFER, TRITON, operator
from shardwise.ops.triton_support import Kernel, Launch
from shardwise.ops.vector_access import with_vectors

_ready = Kernel(kernels.ready_kernel)
_drop = Kernel(kernels.drop_kernel)
# Of steps without a copy or padding, by their layout.
STEPS: Kept[Plan] = Kept()


@operator(fake=like_hidden, mutates=("ssm_state_cache",), needs=(FLASHINFER, TRITON), instead="torch_cached_ssm")
def flashinfer_cached_ssm(
    hidden_states: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    chunk_indices: torch.Tensor,
    chunk_offsets: torch.Tensor,
    seq_idx_prefill: torch.Tensor,
    ssm_state_cache: torch.Tensor,
    time_step_limit: list[float],
    chunk_size: int,
) -> torch.Tensor:
    """As `triton_cached_ssm`; the head size P must be 64 or 128, the states of a slot contiguous, and there must be at
    least as many slots as decode sequences."""
    op = "flashinfer_cached_ssm"
    if hidden_states.shape[-1] not in (64, 128):
        raise ValueError(
            f"{op}: FlashInfer takes head sizes 64 and 128, got {hidden_states.shape[-1]}; triton_cached_ssm takes any"
        )
    return run_step(
        op, STEPS, _plan_decode, _decode, hidden_states, A, B, C, D, dt, dt_bias, batch_info_host, cu_seqlen, slot_idx,
        use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill, ssm_state_cache, time_step_limit, chunk_size,
    )  # fmt: skip


class _Decode(NamedTuple):
    """A decode step, but for its tensors: two small kernels of ours and what FlashInfer gets between them.

    The first makes the time steps, clamped, which FlashInfer's are not, and 32-bit slots; the last gives zeros to the
    tokens without a slot, for which FlashInfer computes something from an empty state.
    """

    ready: Launch
    drop: Launch
    steps_room: Callable[[], torch.Tensor]
    """Makes room for the time steps [tokens, H, P], one number a head, repeated by strides, as FlashInfer wants it"""
    index_room: Callable[[], torch.Tensor]
    """Makes room for the slots"""
    rows: tuple[View, ...]
    """Where x, B and C have the decode tokens, [tokens, heads, D]"""
    vectors: bool
    """Whether FlashInfer's vectors may read them where they begin at multiples of 16 bytes"""
    out: View
    A: View
    """The vector repeated, [H, P, N]"""
    D: View
    exact: bool
    """Whether these are float32"""


@functools.cache
def _update() -> Callable:
    from flashinfer.mamba import selective_state_update

    return selective_state_update


def _plan_decode(op: str, one: Inputs, batch: Batch) -> _Decode:
    count, device, (heads, size) = batch.decode, one.x.device, one.x.shape[2:]
    if one.cache.shape[0] < count:
        raise ValueError(
            f"{op}: FlashInfer wants a slot for each of the {count} decode sequences, the cache has "
            f"{one.cache.shape[0]}; triton_cached_ssm takes any number"
        )
    steps = torch.empty(0, dtype=torch.float32, device=device)  # for dtypes alone
    index = torch.empty(0, dtype=torch.int32, device=device)
    ready = _ready.form_for(
        device,
        (one.dt, one.dt_bias, one.slots, steps, index, report_word(op)),
        (one.dt_t, 1 << (heads - 1).bit_length()),
        warps=4,
    )
    drop = _drop.form_for(device, (index, one.out), (1024,), warps=4)
    grid, free = (count, 1, 1), (batch.prefill_tokens, batch.prefill, heads, one.cache.shape[0], one.low, one.high)
    rows = tuple(_rows(tensor, batch) for tensor in (one.x, one.B, one.C))
    return _Decode(
        Launch(ready, grid, free),
        Launch(drop, grid, (heads * size,)),
        fresh((count, heads, size), torch.float32, device, strides=(heads, 1, 0)),
        fresh((count,), torch.int32, device),
        rows,
        all(
            _takes_vectors(view, tensor.element_size())
            for view, tensor in zip(rows, (one.x, one.B, one.C), strict=True)
        ),
        _rows(one.out, batch),
        ((heads, size, one.B.shape[3]), (1, 0, 0), 0),
        ((heads, size), (1, 0), 0),
        one.A.dtype == one.D.dtype == torch.float32,
    )


def _rows(tensor: torch.Tensor, batch: Batch) -> View:
    """The decode tokens of [b, s, heads, D], where only one of b and s exceeds 1."""
    strides = tensor.view(-1, *tensor.shape[2:]).stride() if tensor.numel() else (0, 0, 0)
    return (batch.decode, *tensor.shape[2:]), strides, batch.prefill_tokens * strides[0]


def _takes_vectors(rows: View, item: int) -> bool:
    """Whether they are dense in a token, and tokens are multiples of 16 bytes apart."""
    (_, _, size), (token, head, element), _ = rows
    return element == 1 and head == size and token * item % 16 == 0


def _decode(op: str, plan: _Decode, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    x, dt, dt_bias, A, B, C, D, slots, cache = given
    steps, index = plan.steps_room(), plan.index_room()
    plan.ready.form(plan.ready.grid, (dt, dt_bias, slots, steps, index, report_word(op)), plan.ready.free)
    x, B, C = (view(tensor, *rows) for tensor, rows in zip((x, B, C), plan.rows, strict=True))
    if not plan.vectors or math.gcd(16, x.data_ptr(), B.data_ptr(), C.data_ptr()) != 16:
        x, B, C = (with_vectors(rows.contiguous()) for rows in (x, B, C))
    if not plan.exact:
        A, D = A.float(), D.float()
    rows = view(out, *plan.out)
    _update()(
        cache, x, steps, view(A, *plan.A), B, C, view(D, *plan.D), state_batch_indices=index, pad_slot_id=-1, out=rows
    )
    plan.drop.form(plan.drop.grid, (index, rows), plan.drop.free)
