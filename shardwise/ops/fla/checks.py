"""Shape rules of the delta-rule operators."""

from torch import Tensor


def check_delta(
    op: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cache: Tensor | None = None
) -> None:
    """Raises ValueError when shapes contradict q, k [B, T, H, K], v [B, T, HV, V] with HV a multiple of H."""
    if q.dim() != 4 or v.dim() != 4 or k.shape != q.shape or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"{op}: q and k must be [B, T, H, K] and v [B, T, HV, V] with HV a multiple of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    for name, tensor in (("beta", beta), ("g", g)):
        if tensor is not None and tensor.shape != v.shape[:3]:
            raise ValueError(f"{op}: {name} must be {tuple(v.shape[:3])}, got {tuple(tensor.shape)}")
    state = (v.shape[2], q.shape[3], v.shape[3])
    if cache is not None and tuple(cache.shape[1:]) != state:
        raise ValueError(f"{op}: delta_cache must be [slots, HV, K, V] = [slots, {state}], got {tuple(cache.shape)}")
