"""Rotary position embeddings in plain PyTorch. Source: Su et al., arXiv:2104.09864.

Two pairings exist: NeoX turns element i with element i + D/2; interleaved turns elements 2i and 2i+1.
"""

import torch

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
    _check("torch_rope_with_explicit_cos_sin", q, cos.shape[-1])
    cos = cos.to(q.dtype).unsqueeze(unsqueeze_dim)
    sin = sin.to(q.dtype).unsqueeze(unsqueeze_dim)
    return _turn(q, cos, sin), _turn(k, cos, sin)


@operator(fake=_pair)
def torch_rope_with_complex_freqs(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor, unsqueeze_dim: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interleaved rotation as a complex product in float32; pairs stay interleaved.

    xq, xk [B, S, N, D] with unsqueeze_dim 2 or [B, N, S, D] with 1; freqs_cis complex64 [B, S, D/2].
    """
    _check("torch_rope_with_complex_freqs", xq, 2 * freqs_cis.shape[-1])
    freqs = freqs_cis.unsqueeze(unsqueeze_dim)

    def turn(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
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
    _check("torch_rope_with_qk_interleaving", q, cos.shape[-1])
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x):
        split = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        half = split.shape[-1] // 2
        turned = torch.cat((-split[..., half:], split[..., :half]), dim=-1)
        return torch.empty_like(x).copy_(split * cos + turned * sin)

    return turn(q), turn(k)


def _check(name: str, x: torch.Tensor, size: int) -> None:
    if x.shape[-1] % 2 or x.shape[-1] != size:
        raise ValueError(
            f"{name}: the head size must be even and match the angles: x {tuple(x.shape)}, angles for size {size}"
        )
