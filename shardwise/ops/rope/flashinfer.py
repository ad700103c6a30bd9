"""Rotary position embedding of FlashInfer."""

import functools
import math
from typing import NamedTuple

import torch

from shardwise.ops.devices import require_one_device
from shardwise.ops.registry import FLASHINFER, operator
from shardwise.ops.rope.reference import contiguous_pair
from shardwise.ops.vector_access import with_vectors
from shardwise.plan_cache import PlanCache, view

_View = tuple[tuple[int, ...], tuple[int, ...]]


@functools.cache
def _function():
    from flashinfer.rope import apply_rope_with_cos_sin_cache

    return apply_rope_with_cos_sin_cache


@operator(fake=contiguous_pair, needs=(FLASHINFER,), instead="torch_rope_with_explicit_cos_sin")
def flashinfer_rope(
    q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation with a table of angles, NeoX pairing or (is_neox False) interleaved pairs. Results contiguous.

    q, k [B, S, N, D] or [T, N, D] float16 or bfloat16, D a multiple of 64; position_ids int [B, S] or [T];
    cos_sin_cache float32 [positions, D]: cosines of the D/2 angles, then their sines.
    """
    given = q, k, position_ids, cos_sin_cache
    plan = _PLANS.get(q.shape, given) or _PLANS.keep(q.shape, given, _plan(*given))
    if not plan.tokens:
        return contiguous_pair(q, k)
    if not plan.dense or math.gcd(16, q.data_ptr(), k.data_ptr(), cos_sin_cache.data_ptr()) != 16:
        q, k = (with_vectors(each.reshape(plan.tokens, -1)) for each in (q, k))
        cos_sin_cache = with_vectors(cos_sin_cache)
    elif plan.flatten:
        q, k = view(q, *plan.rows[0]), view(k, *plan.rows[1])
    if not plan.ready:
        # The kernel has forms for two types of positions.
        wide = position_ids if position_ids.dtype in (torch.int32, torch.int64) else position_ids.to(torch.int64)
        position_ids, cos_sin_cache = wide.reshape(-1).contiguous(), cos_sin_cache.contiguous()
    q_out, k_out = _function()(position_ids, q, k, plan.size, cos_sin_cache, is_neox)
    return view(q_out, *plan.results[0]), view(k_out, *plan.results[1])


class _Plan(NamedTuple):
    """What follows from the layout of the tensors: sizes and strides of contiguous views, for q and k."""

    tokens: int
    size: int
    """D"""
    dense: bool
    """Whether q and k are contiguous"""
    flatten: bool
    """Whether they have more than three dimensions"""
    ready: bool
    """Whether positions and table are as the kernel reads them"""
    rows: tuple[_View, ...]
    """[T, N, D]"""
    results: tuple[_View, ...]
    """Of the operator"""


_PLANS: PlanCache[_Plan] = PlanCache()


def _plan(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> _Plan:
    require_one_device("flashinfer_rope", q, k, positions, table)
    tokens, size = _checked(q, k, positions, table)
    return _Plan(
        tokens if q.numel() else 0,
        size,
        q.is_contiguous() and k.is_contiguous(),
        q.dim() != 3 or k.dim() != 3,
        positions.dim() == 1
        and positions.dtype in (torch.int32, torch.int64)
        and positions.is_contiguous()
        and table.is_contiguous(),
        tuple(((tokens, each.shape[-2], size), (each.shape[-2] * size, size, 1)) for each in (q, k)),
        tuple((tuple(each.shape), _contiguous_strides(each)) for each in (q, k)),
    )


def _contiguous_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def _checked(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> tuple[int, int]:
    """Tokens and head size."""
    size = table.shape[-1]
    if table.dtype != torch.float32:
        raise TypeError(f"flashinfer_rope: cos_sin_cache must be float32, got {table.dtype}")
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        raise TypeError(f"flashinfer_rope: q and k must both be float16 or bfloat16, got {q.dtype} and {k.dtype}")
    if table.dim() != 2 or size % 64 or q.shape[-1] != size or k.shape[-1] != size:
        raise ValueError(
            f"flashinfer_rope: the head size must be a multiple of 64 and equal to cos_sin_cache's {size}, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    tokens = q.shape[:-2].numel()
    if positions.numel() != tokens or k.shape[:-2].numel() != tokens:
        raise ValueError(f"flashinfer_rope: {tokens} tokens in q, {positions.numel()} position_ids, k {tuple(k.shape)}")
    return tokens, size
