"""Rotary position embedding of FlashInfer."""

import functools

import torch

from shardwise.ops.registry import FLASHINFER, operator
from shardwise.ops.vector_access import with_vectors


@functools.cache
def _function():
    from flashinfer.rope import apply_rope_with_cos_sin_cache

    return apply_rope_with_cos_sin_cache


def _pair(q, k, *_args, **_kwargs):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


@operator(fake=_pair, needs=(FLASHINFER,), instead="torch_rope_with_explicit_cos_sin")
def flashinfer_rope(
    q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation with a table of angles, NeoX pairing or (is_neox False) interleaved pairs. Results contiguous.

    q, k [B, S, N, D] or [T, N, D] float16 or bfloat16, D a multiple of 64; position_ids int [B, S] or [T];
    cos_sin_cache float32 [positions, D]: cosines of the D/2 angles, then their sines.
    """
    size = cos_sin_cache.shape[-1]
    _check(q, k, position_ids, cos_sin_cache, size)
    if q.numel() == 0:
        return _pair(q, k)
    tokens = position_ids.numel()
    positions = position_ids.reshape(-1)
    if positions.dtype not in (torch.int32, torch.int64):  # the kernel has forms for both
        positions = positions.to(torch.int64)
    q_rows, k_rows = with_vectors(q.reshape(tokens, -1)), with_vectors(k.reshape(tokens, -1))
    q_out, k_out = _function()(positions.contiguous(), q_rows, k_rows, size, cos_sin_cache.contiguous(), is_neox)
    return q_out.view(q.shape), k_out.view(k.shape)


def _check(q, k, position_ids, cos_sin_cache, size) -> None:
    if cos_sin_cache.dtype != torch.float32:
        raise TypeError(f"flashinfer_rope: cos_sin_cache must be float32, got {cos_sin_cache.dtype}")
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        raise TypeError(f"flashinfer_rope: q and k must both be float16 or bfloat16, got {q.dtype} and {k.dtype}")
    if size % 64 or q.shape[-1] != size or k.shape[-1] != size:
        raise ValueError(
            f"flashinfer_rope: the head size must be a multiple of 64 and equal to cos_sin_cache's {size}, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    tokens = q.shape[:-2].numel()
    if position_ids.numel() != tokens or k.shape[:-2].numel() != tokens:
        raise ValueError(
            f"flashinfer_rope: {tokens} tokens in q, {position_ids.numel()} position_ids, k {tuple(k.shape)}"
        )
