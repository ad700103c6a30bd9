"""Linear layer and dense top-k router in plain PyTorch."""

import torch

from shardwise.ops.dtypes import check_float
from shardwise.ops.registry import operator


def _linear(input, weight, bias):
    return torch.nn.functional.linear(input, weight, bias)


@operator(fake=_linear)
def torch_linear_simple(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """input @ weight.T + bias, all of one dtype. input [..., in], weight [out, in], bias [out] or None."""
    _check("torch_linear_simple", input, weight, bias)
    return torch.nn.functional.linear(input, weight, bias)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """ValueError and TypeError for what does not fit together."""
    wrong_bias = bias is not None and bias.shape != weight.shape[:1]
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or wrong_bias:
        came = "None" if bias is None else tuple(bias.shape)
        raise ValueError(
            f"{op}: {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {came} do not fit; legal: [..., in], "
            "[out, in] and [out]"
        )
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(f"{op}: came {x.dtype}, weight {weight.dtype}"
                        f"{'' if bias is None else f', bias {bias.dtype}'}; legal: one dtype")  # fmt: skip


def _router(hidden_states, weight, bias, top_k=2):
    return hidden_states.new_empty((hidden_states.numel() // hidden_states.shape[-1], weight.shape[0]))


@operator(fake=_router)
def torch_moe_router(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int = 2
) -> torch.Tensor:
    """Dense routing weights: softmax over the top_k logits of each token, zero elsewhere.

    hidden_states [B, S, H] or [T, H], weight [E, H], bias [E] -> [T, E] in the dtype of the logits.
    """
    _check("torch_moe_router", hidden_states, weight, bias)
    check_float("torch_moe_router", "hidden_states", hidden_states)
    experts = weight.shape[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"torch_moe_router: top_k = {top_k} must lie in 1..{experts}, the number of experts")
    tokens = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = torch.nn.functional.linear(tokens, weight, bias)
    values, chosen = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1))
