"""The causal convolution of recurrent layers, which continues from each sequence's last inputs."""

import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.mamba.conv_reference import torch_cached_causal_conv1d
from shardwise.ops.mamba.conv_triton import triton_cached_causal_conv1d
from shardwise.parallel.states import StateSpans


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: StateSpans, states: Tensor, *, kernels: bool
) -> Tensor:
    """silu of the convolution of x [T, C], any strides, over each sequence: [T, C]; may overwrite x.

    weight   [C, 1, K]
    bias     [C]
    states   `LayerState.conv`
    kernels  `StateCache.kernels`
    """
    channels, _, width = weight.shape
    metadata = batch.batch_info, batch.seq_len, batch.cu_seqlen, batch.slots, batch.resumes
    layout = 1, width - 1, 1, channels, "zeros"
    if kernels:
        triton_cached_causal_conv1d(x[None], weight, bias, *metadata, states, *layout, "silu")
        return x
    return F.silu(torch_cached_causal_conv1d(x[None], weight, bias, *metadata, states, *layout)[0])
