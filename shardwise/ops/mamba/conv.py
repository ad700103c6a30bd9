"""What the in-place causal convolutions share: argument checks and the split into prefill and decode."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.state_batch import check_counts


@dataclass(frozen=True)
class ConvBatch:
    """x [T, C], weight [C, K], bias [C] or None, cache [slots, C, K - 1]."""

    batch: Batch
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bounds: Tensor
    slots: Tensor
    resumes: Tensor
    cache: Tensor
    silu: bool


def prepare(
    op: str, input, weight, bias, batch_info_host, cu_seqlen, slot_idx, resumes, cache, activation
) -> ConvBatch:
    """Checked and flattened arguments; raises ValueError. Shapes only: device memory is not looked at."""
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    channels, K = input.shape[-1], weight.shape[-1]
    if input.dim() != 3 or weight.numel() != channels * K or weight.shape[0] != channels:
        raise ValueError(
            f"{op}: input must be [b, s, C] and weight [C, 1, K] or [C, K], got {tuple(input.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if tuple(cache.shape[1:]) != (channels, K - 1) or K < 2:
        raise ValueError(
            f"{op}: conv_state_cache must be [slots, C = {channels}, K - 1 = {K - 1}], got {tuple(cache.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{op}: bias must be [{channels}], got {tuple(bias.shape)}")
    batch = read_batch(op, batch_info_host)
    rows = input.shape[0] * input.shape[1]
    check_counts(op, batch, rows, slot_idx, resumes)
    if batch.prefill and cu_seqlen.numel() < batch.prefill + 1:
        raise ValueError(f"{op}: cu_seqlen has {cu_seqlen.numel()} entries; {batch.prefill} sequences need one more")
    bias = None if bias is None else bias.contiguous()
    weight = weight.reshape(channels, K).contiguous()
    slots = slot_idx.contiguous()
    return ConvBatch(
        batch, input.view(rows, channels), weight, bias, cu_seqlen, slots, resumes, cache, activation == "silu"
    )


def nothing(input, weight, *_args) -> None:
    """Fake of the in-place operators."""
    return None


def halo(one: ConvBatch, rows: int) -> Tensor:
    """Room for the K - 1 inputs before each block of `rows` prefill tokens; a sequence begins a new block."""
    blocks = -(-one.batch.prefill_tokens // rows) + one.batch.prefill
    return torch.empty((blocks, one.weight.shape[1] - 1, one.x.shape[1]), dtype=one.x.dtype, device=one.x.device)
