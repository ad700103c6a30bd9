"""Argument checks shared by the attention operators, and the head counts that they derive."""

from typing import NamedTuple

import torch

from shardwise.ops.dtypes import check_cache, check_float


class Heads(NamedTuple):
    """Head counts and sizes of one attention call."""

    queries: int
    """N"""
    keys: int
    """Nkv"""
    size: int
    """D"""
    value_size: int
    """Dv"""

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.queries // self.keys


def shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def check_sinks(op: str, sinks: torch.Tensor | None, heads: int) -> None:
    if sinks is not None and sinks.numel() != heads:
        raise ValueError(
            f"{op}: sinks has {sinks.numel()} elements; legal: one logit for each of the {heads} query heads"
        )


def check_mask(op: str, mask: torch.Tensor | None, scores: tuple[int, ...]) -> None:
    """ValueError unless a mask can be shared by scores [B, N, Sq, Sk]."""
    pairs = [] if mask is None else zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask is not None and (mask.dim() > len(scores) or any(a not in (1, b) for a, b in pairs)):
        raise ValueError(f"{op}: attn_mask has shape {shape(mask)}; legal: {list(scores)}, or 1 where it is shared")


def default_scale(scale: float | None, head_size: int) -> float:
    return head_size**-0.5 if scale is None else scale


def check_cached(op, q, k, v, k_cache, v_cache, sinks) -> Heads:
    """Check the tensors of an operator with an unpaged cache [slots, max_seq, Nkv, D]; returns its heads.

    q is [b, s, N, D] or [b, s, N*D], k and v likewise with Nkv heads of size D and Dv.
    """
    check_float(op, "q", q)
    if k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"{op}: k_cache {shape(k_cache)} and v_cache {shape(v_cache)}; "
                         "legal: [slots, max_seq, Nkv, D] and [slots, max_seq, Nkv, Dv]")  # fmt: skip
    check_cache(op, "k_cache", k_cache)
    check_cache(op, "v_cache", v_cache)
    kv_heads, size, value_size = k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
    heads = Heads(check_tokens(op, "q", q.shape, q.shape, size), kv_heads, size, value_size)
    for name, tensor, width in (("k", k, size), ("v", v, value_size)):
        if check_tokens(op, name, tensor.shape, q.shape, width) != kv_heads:
            raise ValueError(f"{op}: {name} {shape(tensor)} does not hold the cache's {kv_heads} heads of size {width}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, q is {q.dtype}; legal: one dtype")
    if kv_heads == 0 or heads.queries % kv_heads:
        raise ValueError(f"{op}: {heads.queries} query heads over {kv_heads} KV heads; legal: a multiple")
    check_sinks(op, sinks, heads.queries)
    return heads


def check_tokens(op: str, name: str, tensor: torch.Size, q: torch.Size, size: int) -> int:
    """Heads of a tensor of shape [b, s, heads, size] or [b, s, heads * size] with q's b and s."""
    heads, rest = divmod(tensor[-1], size) if len(tensor) == 3 else (tensor[-2], tensor[-1] - size)
    if len(tensor) not in (3, 4) or rest or tensor[:2] != q[:2]:
        raise ValueError(f"{op}: {name} has shape {list(tensor)}; legal: {list(q[:2])} followed by "
                         f"heads, {size} or by heads * {size}")  # fmt: skip
    return heads


def cached_output_shape(q, k_cache, v_cache) -> list[int]:
    """Shape of the result: q's, with Dv in place of D."""
    if q.dim() == 4:
        return [*q.shape[:-1], v_cache.shape[-1]]
    return [*q.shape[:-1], q.shape[-1] // k_cache.shape[-1] * v_cache.shape[-1]]


def fake_cached(q, k_cache, v_cache) -> torch.Tensor:
    return q.new_empty(cached_output_shape(q, k_cache, v_cache))
