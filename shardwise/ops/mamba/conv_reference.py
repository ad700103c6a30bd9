"""Causal convolution over time in plain PyTorch; gradients are not provided."""

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.dtypes import check_cache, check_float
from shardwise.ops.registry import operator
from shardwise.ops.state_batch import read_state_spans


def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    return input.new_empty((*input.shape[:2], weight.shape[0]))


@operator(fake=_conv)
def torch_causal_conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Convolution over time, the first s outputs kept: causal when padding is K - 1.

    input [b, s, C], weight [Cout, C / groups, K], bias [Cout] -> [b, s, Cout].
    """
    op = "torch_causal_conv1d"
    if padding_mode != "zeros":
        raise ValueError(f"{op}: padding_mode must be 'zeros', got {padding_mode!r}")
    _check_layer(op, input, weight, bias, groups)
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(f"{op}: stride {stride}, padding {padding}, dilation {dilation}; legal: 1, 0, 1 and more")
    tokens = input.shape[1]
    outputs = max(0, (tokens + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1)
    if outputs < tokens:
        raise ValueError(
            f"{op}: stride {stride}, padding {padding}, dilation {dilation} give {outputs} outputs for {tokens} tokens"
            "; use stride 1 and padding K - 1"
        )
    out = torch.nn.functional.conv1d(input.transpose(1, 2), weight, bias, stride, padding, dilation, groups)
    return out[..., :tokens].transpose(1, 2).contiguous()


def _cached_conv(input, weight, *_args):
    return input.new_empty((*input.shape[:2], weight.shape[0]))


@operator(fake=_cached_conv, mutates=("conv_state_cache",))
def torch_cached_causal_conv1d(
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
) -> torch.Tensor:
    """Causal convolution of a flat batch whose history stands in a cache; a new tensor [b, s, Cout].

    input [b, 1, C] or [1, T, C]; weight [Cout, C / groups, K]; conv_state_cache [slots, C, K] holds the last K inputs
    of a sequence. The history takes the place of `padding`. Slot -1 is skipped; its tokens and the padding give zeros.
    """
    op = "torch_cached_causal_conv1d"
    _check_layer(op, input, weight, bias, groups)
    _check_cached(op, input, weight, conv_state_cache, stride, dilation, padding_mode)
    x, K = input.flatten(0, 1), weight.shape[-1]
    batch = read_batch(op, batch_info_host)
    spans = read_state_spans(op, batch, x.shape[0], cu_seqlen, slot_idx, use_initial_states, conv_state_cache.shape[0])
    out = x.new_zeros((x.shape[0], weight.shape[0]))
    for span in spans[: batch.prefill]:
        if span.slot < 0 or not span.length:
            continue
        rows = slice(span.start, span.start + span.length)
        past = conv_state_cache[span.slot, :, 1:].to(x.dtype) if span.resumes else x.new_zeros(x.shape[1], K - 1)
        joined = torch.cat((past, x[rows].T), 1)
        out[rows] = torch.nn.functional.conv1d(joined, weight, bias, groups=groups).T
        conv_state_cache[span.slot] = joined[:, -K:]
    live = [(span.start, span.slot) for span in spans[batch.prefill :] if span.slot >= 0]
    if live:
        tokens, slots = torch.tensor(live, device=x.device).unbind(1)
        window = torch.cat((conv_state_cache[slots, :, 1:].to(x.dtype), x[tokens, :, None]), -1)
        out[tokens] = torch.nn.functional.conv1d(window, weight, bias, groups=groups)[..., 0]
        conv_state_cache[slots] = window.to(conv_state_cache.dtype)
    return out.view(*input.shape[:2], weight.shape[0])


def _check_layer(op, input, weight, bias, groups) -> None:
    fits = input.dim() == weight.dim() == 3 and groups >= 1 and weight.shape[1] * groups == input.shape[2]
    if not fits or weight.shape[0] % groups or (bias is not None and bias.shape != weight.shape[:1]):
        came = f"{tuple(input.shape)}, {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"{op}: input, weight and bias are {came} with groups {groups}; legal: [b, s, C], "
                         "[Cout, C / groups, K] and [Cout], groups a divisor of both C and Cout")  # fmt: skip
    check_float(op, "input", input)
    if any(each is not None and each.dtype != input.dtype for each in (weight, bias)):
        came = f"{weight.dtype} and {None if bias is None else bias.dtype}"
        raise TypeError(f"{op}: weight and bias are {came}; legal: input's {input.dtype}")


def _check_cached(op, input, weight, cache, stride, dilation, padding_mode) -> None:
    if stride != 1 or dilation != 1 or padding_mode != "zeros":
        raise ValueError(
            f"{op}: only stride 1, dilation 1 and padding_mode 'zeros' continue from a cache, "
            f"got {stride}, {dilation}, {padding_mode!r}"
        )
    check_cache(op, "conv_state_cache", cache)
    if tuple(cache.shape[1:]) != (input.shape[-1], weight.shape[-1]):
        raise ValueError(
            f"{op}: conv_state_cache must be [slots, C = {input.shape[-1]}, K = {weight.shape[-1]}], "
            f"got {tuple(cache.shape)}"
        )
