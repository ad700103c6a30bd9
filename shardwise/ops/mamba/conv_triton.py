"""Causal convolution in place, on our own Triton kernels.

Prefill works on blocks of tokens in parallel. Because a block's result replaces inputs that its successor needs, a
first kernel saves the K - 1 inputs before every block and brings the state caches up to date; a second one computes.
"""

import torch

from shardwise.ops.mamba.conv import ConvBatch, halo, nothing, prepare
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Kernel, tl, triton

ROWS, WIDTH, DECODE_WIDTH = 32, 128, 256


@triton.jit
def _find_block(bounds_ptr, sequences, block, ROWS: tl.constexpr, SEQUENCES: tl.constexpr):
    """(sequence, its first token, its end, tokens before the block); sequence == sequences for unused blocks."""
    j = tl.arange(0, SEQUENCES)
    low = tl.load(bounds_ptr + j, mask=j < sequences, other=0)
    high = tl.load(bounds_ptr + j + 1, mask=j < sequences, other=0)
    ends = tl.cumsum(tl.cdiv(high - low, ROWS), axis=0)
    done = (ends <= block) & (j < sequences)
    sequence = tl.sum(done.to(tl.int32), axis=0)
    before = tl.max(tl.where(done, ends, 0), axis=0)
    start = tl.load(bounds_ptr + sequence, mask=sequence < sequences, other=0)
    end = tl.load(bounds_ptr + sequence + 1, mask=sequence < sequences, other=0)
    return sequence, start, end, (block - before) * ROWS


@triton.jit(do_not_specialize=["sequences", "slots", "channels"])
def _save_kernel(
    x_ptr,
    bounds_ptr,
    slot_ptr,
    resume_ptr,
    cache_ptr,
    halo_ptr,
    sequences,
    slots,
    channels,
    x_t,
    x_c,
    cache_slot,
    cache_c,
    cache_k,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Inputs before one block into its halo; at a sequence's first block also its new state into the cache."""
    block = tl.program_id(0).to(tl.int64)
    sequence, start, end, local = _find_block(bounds_ptr, sequences, block, ROWS, SEQUENCES)
    if sequence >= sequences:
        return
    slot = tl.load(slot_ptr + sequence).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        return
    k = tl.arange(0, TAPS)[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mask = (k < K - 1) & (c < channels)
    resume = tl.load(resume_ptr + sequence).to(tl.int1)
    cached = cache_ptr + slot * cache_slot + c * cache_c
    row = local + k - (K - 1)
    past = tl.load(cached + k * cache_k, mask=mask & resume & (local == 0), other=0.0)
    inside = tl.load(x_ptr + (start + row).to(tl.int64) * x_t + c * x_c, mask=mask & (row >= 0), other=0.0)
    before = tl.where(row >= 0, inside, past.to(inside.dtype))
    length = end - start
    last = length + k - (K - 1)
    fresh = tl.load(x_ptr + (start + last).to(tl.int64) * x_t + c * x_c, mask=mask & (last >= 0), other=0.0)
    kept = tl.load(cached + (length + k) * cache_k, mask=mask & resume & (last < 0), other=0.0)
    tl.debug_barrier()
    tl.store(halo_ptr + (block * (K - 1) + k) * channels + c, before, mask=mask)
    state = tl.where(last >= 0, fresh.to(cache_ptr.dtype.element_ty), kept)
    tl.store(cached + k * cache_k, state, mask=mask & (local == 0))


@triton.jit(do_not_specialize=["sequences", "slots", "channels"])
def _prefill_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    bounds_ptr,
    slot_ptr,
    halo_ptr,
    sequences,
    slots,
    channels,
    x_t,
    x_c,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One block of tokens and channels: all its inputs are read before the first result is written."""
    block = tl.program_id(0).to(tl.int64)
    sequence, start, end, local = _find_block(bounds_ptr, sequences, block, ROWS, SEQUENCES)
    if sequence >= sequences:
        return
    slot = tl.load(slot_ptr + sequence)
    if (slot < 0) | (slot >= slots):
        return
    i = tl.arange(0, ROWS)[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mask = (start + local + i < end) & (c < channels)
    rows = x_ptr + (start + local + i).to(tl.int64) * x_t + c * x_c
    out = tl.zeros((ROWS, CHANNELS), tl.float32)
    if BIAS:
        out += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        back = i + k - (K - 1)
        x = tl.load(rows + (k - (K - 1)) * x_t, mask=mask & (back >= 0), other=0.0).to(tl.float32)
        if k < K - 1:
            saved = halo_ptr + (block * (K - 1) + i + k) * channels + c
            x += tl.load(saved, mask=mask & (back < 0), other=0.0).to(tl.float32)
        out += x * tl.load(weight_ptr + c * K + k, mask=c < channels, other=0.0).to(tl.float32)
    if SILU:
        out *= tl.sigmoid(out)
    tl.debug_barrier()
    tl.store(rows, out.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots", "channels"])
def _decode_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    slot_ptr,
    cache_ptr,
    slots,
    channels,
    x_t,
    x_c,
    cache_slot,
    cache_c,
    cache_k,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One token and a block of its channels."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        return
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, TAPS)[None, :]
    mask = (c < channels)[:, None] & (k < K - 1)
    row = x_ptr + token * x_t + c * x_c
    raw = tl.load(row, mask=c < channels, other=0.0)
    x = raw.to(tl.float32)
    cached = cache_ptr + slot * cache_slot + c[:, None] * cache_c + k * cache_k
    state = tl.load(cached, mask=mask, other=0.0).to(tl.float32)
    shifted = tl.load(cached + cache_k, mask=mask & (k < K - 2), other=0.0)
    taps = tl.load(weight_ptr + c[:, None] * K + k, mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(state * taps, axis=1) + x * tl.load(weight_ptr + c * K + K - 1, mask=c < channels, other=0.0).to(
        tl.float32
    )
    if BIAS:
        out += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    if SILU:
        out *= tl.sigmoid(out)
    tl.debug_barrier()
    tl.store(cached, tl.where(k == K - 2, raw[:, None].to(cache_ptr.dtype.element_ty), shifted), mask=mask)
    tl.store(row, out.to(x_ptr.dtype.element_ty), mask=c < channels)


_launch_save = Kernel(_save_kernel)
_launch_prefill = Kernel(_prefill_kernel)
_launch_decode = Kernel(_decode_kernel)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _prefill(one: ConvBatch) -> None:
    channels, K = one.weight.shape
    saved, sequences, slots = halo(one, ROWS), one.batch.prefill, one.cache.shape[0]
    width, lookup = min(WIDTH, _power(channels)), _power(sequences)
    bias = one.weight if one.bias is None else one.bias
    grid = (saved.shape[0], -(-channels // width), 1)
    free, strides = (sequences, slots, channels), one.x.stride()
    _launch_save(
        one.x.device,
        grid,
        (one.x, one.bounds, one.slots, one.resumes, one.cache, saved),
        free,
        (*strides, *one.cache.stride(), K, _power(K - 1), ROWS, width, lookup),
        warps=2,
    )
    _launch_prefill(
        one.x.device,
        grid,
        (one.x, one.weight, bias, one.bounds, one.slots, saved),
        free,
        (*strides, K, ROWS, width, lookup, one.bias is not None, one.silu),
        warps=4,
    )


def _decode(one: ConvBatch) -> None:
    channels, K = one.weight.shape
    x, slots = one.x[one.batch.prefill_tokens : one.batch.tokens], one.slots[one.batch.prefill :]
    width = min(DECODE_WIDTH, _power(channels))
    bias = one.weight if one.bias is None else one.bias
    _launch_decode(
        x.device,
        (x.shape[0], -(-channels // width), 1),
        (x, one.weight, bias, slots, one.cache),
        (one.cache.shape[0], channels),
        (*x.stride(), *one.cache.stride(), K, _power(K - 1), width, one.bias is not None, one.silu),
        warps=4,
    )


@operator(fake=nothing, mutates=("input", "conv_state_cache"), needs=(TRITON,), instead="torch_cached_causal_conv1d")
def triton_cached_causal_conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    conv_state_cache: torch.Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    padding_mode: str,
    activation: str | None,
) -> None:
    """Depthwise causal convolution of a flat batch, in place on `input`, SiLU fused where asked.

    input [b, 1, C] or [1, T, C]; weight [C, 1, K] or [C, K]; conv_state_cache [slots, C, K - 1] holds the last K - 1
    inputs: read where use_initial_states and for decode, brought up to date for all. Slot -1 is skipped: its tokens
    keep their values, as does the padding. stride to padding_mode are accepted and not used.
    """
    one = prepare(
        "triton_cached_causal_conv1d", input, weight, bias, batch_info_host, cu_seqlen, slot_idx,
        use_initial_states, conv_state_cache, activation,
    )  # fmt: skip
    if one.batch.prefill_tokens:
        _prefill(one)
    if one.batch.decode:
        _decode(one)
