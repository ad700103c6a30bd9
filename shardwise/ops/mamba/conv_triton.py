"""Causal convolution in place, on our own Triton kernels (`conv_kernels.py`)."""

import torch

from shardwise.ops.mamba import conv_kernels as kernels
from shardwise.ops.mamba.conv import ConvBatch, block_rows, halo, nothing, prepare
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Kernel, dependent_launch

_OP = "triton_cached_causal_conv1d"
# Channels of a program for each of its warps: eight of a thread, 16 bytes of a half-precision row.
WARP_CHANNELS = 256
PREFILL = {"warps": 4, "ahead": 4}
# From here on a decode program takes several tokens, which share one reading of the weights.
MANY_TOKENS, TOGETHER = 128, 2

_launch_save = Kernel(kernels.save_kernel)
_launch_prefill = Kernel(kernels.prefill_kernel)
_launch_decode = Kernel(kernels.decode_kernel)
_launch_decode_dense = Kernel(kernels.decode_dense_kernel)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _prefill(one: ConvBatch) -> None:
    x, channels, K, rows = one.x, one.channels, one.K, block_rows(one)
    saved, sequences, pdl = halo(one, rows), one.batch.prefill, dependent_launch(x.device)
    blocks, lookup = saved.shape[0], _power(sequences)
    width = min(WARP_CHANNELS, _power(channels))
    free = sequences, one.batch.prefill_tokens, one.cache.shape[0], rows
    strides, bounds, resumes = (channels, one.x_t, one.x_c), one.bounds.contiguous(), one.resumes.contiguous()
    _launch_save(
        x.device,
        (blocks * -(-channels // width), 1, 1),
        (x, bounds, one.slots, resumes, one.cache, saved, report_word(_OP)),
        free,
        (*strides, *one.cache.stride(), K, _power(K - 1), width, lookup, pdl),
        warps=4,
        pdl=pdl,
    )
    width = min(PREFILL["warps"] * WARP_CHANNELS, _power(channels))
    _launch_prefill(
        x.device,
        (blocks * -(-channels // width), 1, 1),
        (x, one.weight, one.weight if one.bias is None else one.bias, bounds, one.slots, saved),
        free,
        (*strides, K, PREFILL["ahead"], width, lookup, one.bias is not None, one.silu, pdl),
        warps=PREFILL["warps"],
        pdl=pdl,
    )


def _decode(one: ConvBatch) -> None:
    cache, channels, tokens, pdl = one.cache, one.channels, one.batch.decode, dependent_launch(one.x.device)
    bias, word = one.weight if one.bias is None else one.bias, report_word(_OP)
    pointers = one.x, one.weight, bias, one.slots, cache, word
    free = one.batch.prefill_tokens, one.batch.prefill, tokens, cache.shape[0]
    strides = slot, c, k = cache.stride()
    if one.K == 4 and one.x_c == 1 and c == 3 and k == 1 and channels % 8 == 0:
        together = 1 if tokens < MANY_TOKENS else TOGETHER
        grid = -(-channels // WARP_CHANNELS) * -(-tokens // together), 1, 1
        dense = channels, one.x_t, slot, together, WARP_CHANNELS // 8, one.bias is not None, one.silu, pdl
        _launch_decode_dense(one.x.device, grid, pointers, free, dense, warps=1, pdl=pdl)
        return
    width = min(WARP_CHANNELS, _power(channels))
    grid = -(-channels // width) * tokens, 1, 1
    fixed = channels, one.x_t, one.x_c, *strides, one.K, width, one.bias is not None, one.silu, pdl
    _launch_decode(one.x.device, grid, pointers, free, fixed, warps=2, pdl=pdl)


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
    keep their values, as does the padding; a slot outside the cache counts as -1. A cu_seqlen that does not ascend from
    0 to the prefill tokens gives wrong values for prefill sequences, never an access outside of the tensors. Both raise
    ValueError in the next call (`metadata_reports.py`), shapes, K and counts that contradict each other in this one.
    stride to padding_mode are accepted and not used.
    """
    one = prepare(
        _OP, input, weight, bias, batch_info_host, cu_seqlen, slot_idx, use_initial_states, conv_state_cache, activation
    )
    if one.batch.prefill_tokens:
        _prefill(one)
    if one.batch.decode:
        _decode(one)
