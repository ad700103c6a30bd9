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
    tokens, size = _checked(
        (q.shape, k.shape, position_ids.shape, cos_sin_cache.shape), (q.dtype, k.dtype, cos_sin_cache.dtype)
    )
    if q.numel() == 0:
        return _pair(q, k)
    positions = position_ids if position_ids.dim() == 1 else position_ids.reshape(-1)
    if positions.dtype not in (torch.int32, torch.int64):  # the kernel has forms for both
        positions = positions.to(torch.int64)
    rows = _rows(q, tokens), _rows(k, tokens)
    q_out, k_out = _function()(positions.contiguous(), *rows, size, cos_sin_cache.contiguous(), is_neox)
    return _shaped(q_out, q.shape), _shaped(k_out, k.shape)


def _rows(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """x as [T, N, D] or [T, N * D]: as it is, or without a dimension of one entry, which is quicker than a reshape."""
    if x.dim() == 4 and x.is_contiguous():
        if x.shape[0] == 1:
            return with_vectors(x.squeeze(0))
        if x.shape[1] == 1:
            return with_vectors(x.squeeze(1))
    elif x.is_contiguous():
        return with_vectors(x)
    return with_vectors(x.reshape(tokens, -1))


def _shaped(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if rows.dim() == 3 and len(shape) == 4:
        return rows.unsqueeze(0 if shape[0] == 1 else 1)
    return rows if rows.shape == shape else rows.view(*shape)  # a Size in one piece takes 1.6 µs longer to read


@functools.lru_cache(maxsize=4096)
def _checked(shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    """Tokens and head size, from the shapes of q, k, position_ids and cos_sin_cache and the dtypes of three of them."""
    (q, k, positions, table), (q_dtype, k_dtype, table_dtype) = shapes, dtypes
    size = table[-1]
    if table_dtype != torch.float32:
        raise TypeError(f"flashinfer_rope: cos_sin_cache must be float32, got {table_dtype}")
    if q_dtype not in (torch.float16, torch.bfloat16) or k_dtype != q_dtype:
        raise TypeError(f"flashinfer_rope: q and k must both be float16 or bfloat16, got {q_dtype} and {k_dtype}")
    if len(table) != 2 or size % 64 or q[-1] != size or k[-1] != size:
        raise ValueError(
            f"flashinfer_rope: the head size must be a multiple of 64 and equal to cos_sin_cache's {size}, "
            f"got q {tuple(q)}, k {tuple(k)}"
        )
    tokens = q[:-2].numel()
    if positions.numel() != tokens or k[:-2].numel() != tokens:
        raise ValueError(f"flashinfer_rope: {tokens} tokens in q, {positions.numel()} position_ids, k {tuple(k)}")
    return tokens, size
