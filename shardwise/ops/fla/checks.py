"""Shape rules of the delta-rule operators."""

from torch import Tensor


def check_delta(
    op: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cache: Tensor | None = None
) -> None:
    """Raises ValueError when shapes contradict q, k [B, T, H, K], v [B, T, HV, V] with HV a multiple of H."""
    if q.dim() == v.dim() == 4:
        (b, t, heads, K), (_, _, v_heads, V) = q.shape, v.shape
        if (
            k.shape == q.shape
            and v.shape == (b, t, v_heads, V)
            and v_heads % heads == 0
            and beta.shape == (b, t, v_heads)
            and (g is None or g.shape == (b, t, v_heads))
            and (cache is None or cache.shape == (cache.shape[0], v_heads, K, V))
        ):
            return
    raise ValueError(f"{op}: {_complaint(q, k, v, beta, g, cache)}")


def _complaint(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cache: Tensor | None) -> str:
    if q.dim() != 4 or v.dim() != 4 or k.shape != q.shape or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        return (
            "q and k must be [B, T, H, K] and v [B, T, HV, V] with HV a multiple of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    for name, tensor in (("beta", beta), ("g", g)):
        if tensor is not None and tensor.shape != v.shape[:3]:
            return f"{name} must be {tuple(v.shape[:3])}, got {tuple(tensor.shape)}"
    state, came = (v.shape[2], q.shape[3], v.shape[3]), None if cache is None else tuple(cache.shape)
    return f"delta_cache must be [slots, HV, K, V] = [slots, {state}], got {came}"
