"""Rotary position embeddings in plain PyTorch. Source: Su et al., arXiv:2104.09864.

Two pairings exist: NeoX turns element i with element i + D/2; interleaved turns elements 2i and 2i+1.
"""

import torch

from shardwise.ops.dtypes import check_float
from shardwise.ops.registry import operator


def _pair(q, k, *_args, **_kwargs):
    return torch.empty_like(q), torch.empty_like(k)


def contiguous_pair(q, k, *_args, **_kwargs):
    """Room for results of the other backends, and their fake."""
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """NeoX rotation; cos and sin carry duplicated halves and broadcast against x [..., D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.empty_like(x).copy_(torch.addcmul(x * cos, turned, sin))


@operator(fake=_pair)
def torch_rope_with_explicit_cos_sin(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """NeoX rotation in q's dtype.

    q, k [B, N, S, D] with unsqueeze_dim 1 or [B, S, N, D] with 2; cos, sin [B, S, D], halves duplicated.
    """
    cos, sin = _with_heads("torch_rope_with_explicit_cos_sin", q, k, (cos, sin), _width(cos), unsqueeze_dim)
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return _turn(q, cos, sin), _turn(k, cos, sin)


@operator(fake=_pair)
def torch_rope_with_complex_freqs(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor, unsqueeze_dim: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interleaved rotation as a complex product in float32; pairs stay interleaved.

    xq, xk [B, S, N, D] with unsqueeze_dim 2 or [B, N, S, D] with 1; freqs_cis complex64 [B, S, D/2].
    """
    if not freqs_cis.is_complex():
        raise TypeError(f"torch_rope_with_complex_freqs: freqs_cis is {freqs_cis.dtype}; legal: complex64, cos + i sin")
    size = 2 * _width(freqs_cis)
    (freqs,) = _with_heads("torch_rope_with_complex_freqs", xq, xk, (freqs_cis,), size, unsqueeze_dim)

    def turn(x):
        pairs = torch.complex(*x.float().unflatten(-1, (-1, 2)).unbind(-1))
        return torch.empty_like(x).copy_(torch.view_as_real(pairs * freqs).flatten(-2))

    return turn(xq), turn(xk)


@operator(fake=_pair)
def torch_rope_with_qk_interleaving(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's form: even channels first, then odd ones, then a NeoX rotation; the result is not re-interleaved.

    q, k [T, N, D] or 4-D, channels interleaved; cos, sin without the head dimension, halves duplicated,
    used in their own dtype.
    """
    cos, sin = _with_heads("torch_rope_with_qk_interleaving", q, k, (cos, sin), _width(cos), unsqueeze_dim)

    def turn(x):
        split = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        half = split.shape[-1] // 2
        turned = torch.cat((-split[..., half:], split[..., :half]), dim=-1)
        return torch.empty_like(x).copy_(split * cos + turned * sin)

    return turn(q), turn(k)


def _with_heads(
    name: str, q: torch.Tensor, k: torch.Tensor, angles: tuple[torch.Tensor, ...], size: int, unsqueeze_dim: int
) -> list[torch.Tensor]:
    """Angles of heads of `size` with a dimension for the heads; ValueError unless they can be shared by q's and k's."""
    placed = all(unsqueeze_dim in range(-one.dim() - 1, one.dim()) and unsqueeze_dim != -1 for one in angles)
    if not placed or len({*map(_width, angles)}) > 1:
        raise ValueError(f"{name}: unsqueeze_dim {unsqueeze_dim} does not belong to angles {_shapes(angles)}")
    wide = [one.unsqueeze(unsqueeze_dim) for one in angles]
    shared = {one.shape[:-1] for one in wide}
    for label, x in (("q", q), ("k", k)):
        check_float(name, label, x)
        if _width(x) % 2 or _width(x) != size:
            raise ValueError(
                f"{name}: the head size must be even and match the angles: x {tuple(x.shape)}, angles for size {size}"
            )
        if not all(_broadcasts(one, x.shape[:-1]) for one in shared):
            raise ValueError(
                f"{name}: angles {_shapes(angles)} with unsqueeze_dim {unsqueeze_dim} do not fit x {tuple(x.shape)}; "
                "legal: x's shape without its heads, or 1 where angles are shared"
            )
    return wide


def _width(x: torch.Tensor) -> int:
    return x.shape[-1] if x.dim() else 1


def _shapes(angles: tuple[torch.Tensor, ...]) -> str:
    return " and ".join(str(tuple(one.shape)) for one in angles)


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    """Whether a tensor of the first shape broadcasts to the second."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)
