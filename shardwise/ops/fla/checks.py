"""Shape rules of the delta-rule operators."""

from torch import Tensor

from shardwise.ops.dtypes import check_cache


def check_delta(
    op: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cache: Tensor | None = None
) -> None:
    """Raises ValueError when shapes contradict q, k [B, T, H, K], v [B, T, HV, V] with HV a multiple of H."""
    # Whole shapes are compared: slices of them cost several times as much.
    if q.dim() != 4 or v.dim() != 4 or k.shape != q.shape:
        raise ValueError(f"{op}: {_heads_complaint(q, k, v)}")
    (batch, tokens, heads, key), (_, _, v_heads, value) = q.shape, v.shape
    if v.shape != (batch, tokens, v_heads, value) or heads < 1 or v_heads % heads:
        raise ValueError(f"{op}: {_heads_complaint(q, k, v)}")
    each = (batch, tokens, v_heads)
    if beta.shape != each:
        raise ValueError(f"{op}: beta must be {each}, got {tuple(beta.shape)}")
    if g is not None and g.shape != each:
        raise ValueError(f"{op}: g must be {each}, got {tuple(g.shape)}")
    if cache is not None and (cache.dim() != 4 or cache.shape != (cache.shape[0], v_heads, key, value)):
        states = f"[slots, {v_heads}, {key}, {value}]"
        raise ValueError(f"{op}: delta_cache must be [slots, HV, K, V] = {states}, got {tuple(cache.shape)}")
    if cache is not None:
        check_cache(op, "delta_cache", cache)


def _heads_complaint(q: Tensor, k: Tensor, v: Tensor) -> str:
    return (
        "q and k must be [B, T, H, K] and v [B, T, HV, V] with HV a multiple of H, "
        f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    )
