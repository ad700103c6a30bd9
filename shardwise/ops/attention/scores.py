"""From attention scores to weights: soft cap, masks, sinks; computed in float32 or wider."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def soft_cap(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(scores / cap); a cap of None or <= 0 leaves the scores as they are. Masks come after it."""
    return scores if cap is None or cap <= 0 else torch.tanh(scores / cap) * cap


def causally_hidden(
    queries: torch.Tensor,  # int [..., Sq], position of each query
    keys: torch.Tensor,  # int [Sk]
    window: int | None,
) -> torch.Tensor:
    """bool [..., Sq, Sk], True where a key is invisible: in the future, or outside the last W positions for W > 0."""
    distance = queries[..., None] - keys
    if window is None or window <= 0:
        return distance < 0
    return (distance < 0) | (distance >= window)


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; a sink logit joins the denominator and takes its weight to no value.

    exp(s) / (sum exp(s) + exp(sink)) = softmax(s) * sigmoid(logsumexp(s) - sink).
    """
    weights = torch.softmax(scores, dim=-1)
    if sinks is None:
        return weights
    return weights * torch.sigmoid(torch.logsumexp(scores, dim=-1, keepdim=True) - sinks)
