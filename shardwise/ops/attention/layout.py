"""How the tensors of attention over an unpaged cache lie in memory, as the Triton kernels must find them."""

from typing import NamedTuple

import torch

from shardwise.ops.attention import tiles
from shardwise.ops.attention.batch import Batch
from shardwise.ops.attention.checks import Heads, check_cached, shape
from shardwise.ops.attention.tiles import Tile
from shardwise.plan_cache import Tensors

MOST_STRIDE = 2**24  # the kernels reach 128 positions with 32-bit offsets


class Shapes(NamedTuple):
    """What follows from shapes, strides and dtypes of q, k, v and the caches alone."""

    heads: Heads
    tokens: int
    """T, padding included"""
    rows: tuple[tuple[int, ...], ...]
    """q, k and v: strides of token and head"""
    caches: tuple[tuple[int, ...], ...]
    """k_cache and v_cache: strides of slot, position and head"""
    sizes: tuple[int, ...]
    """D, Dv and the powers of two that hold them"""
    decode_tile: Tile
    same: tuple
    """Dtypes, strides, heads and tile: where these are equal the same compiled kernels serve"""


def readable(op: str, given: Tensors, batch: Batch, sinks: torch.Tensor | None) -> tuple[Shapes, Tensors]:
    """Checked tensors that kernels can read: copies of those whose tokens or heads have no common stride, and of
    metadata that is not contiguous."""
    (q, k, v, k_cache, v_cache), rest = given[:5], given[5:]
    shapes = _describe(op, q, k, v, k_cache, v_cache, sinks)
    if shapes is None:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        shapes = _describe(op, q, k, v, k_cache, v_cache, sinks)
        assert shapes is not None
    if batch.tokens > shapes.tokens:
        raise ValueError(f"{op}: batch_info_host counts {batch.tokens} tokens, q holds {shapes.tokens}")
    if batch.tokens:
        counts = (batch.sequences, batch.sequences, batch.prefill)
        for name, tensor, count in zip(("input_pos", "slot_idx", "seq_len"), rest, counts, strict=False):
            _check_entries(op, name, tensor, count, q.device)
    return shapes, (q, k, v, k_cache, v_cache, *[tensor.contiguous() for tensor in rest])


def _check_entries(op: str, name: str, tensor: torch.Tensor | None, count: int, device: torch.device) -> None:
    """`tensor` must have an entry for each of `count` sequences."""
    if tensor is None or tensor.numel() < count or tensor.device != device:
        came = "None" if tensor is None else f"{tensor.numel()} entries on {tensor.device}"
        raise ValueError(f"{op}: {name} is {came}; legal: an entry for each of the {count} sequences on {device}")


def _describe(op, q, k, v, k_cache, v_cache, sinks) -> Shapes | None:
    """None where q, k or v must be made contiguous first."""
    heads = check_cached(op, q, k, v, k_cache, v_cache, sinks)
    if q.dtype == torch.float64:
        raise TypeError(f"{op}: q is torch.float64; legal: float16, bfloat16, float32")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            raise ValueError(
                f"{op}: {name} {shape(cache)} has stride {cache.stride(3)} in its last dimension; legal: 1"
            )
        if cache.stride(1) >= MOST_STRIDE:
            raise ValueError(f"{op}: {name} {shape(cache)} has stride {cache.stride(1)} between positions; legal: less "
                             f"than {MOST_STRIDE}")  # fmt: skip
    found = [_row_strides(x, size) for x, size in ((q, heads.size), (k, heads.size), (v, heads.value_size))]
    rows = tuple(row for row in found if row is not None)
    if len(rows) < len(found):
        return None
    caches = tuple(_strides(cache.stride()[:3], cache.shape[:3]) for cache in (k_cache, v_cache))
    sizes = (heads.size, heads.value_size, tiles.power_of_two(heads.size), tiles.power_of_two(heads.value_size))
    dtypes = (q.dtype, k_cache.dtype, v_cache.dtype, None if sinks is None else sinks.dtype)
    tile = tiles.decode_tile(heads.group, heads.size, heads.value_size, q.element_size())
    same = (dtypes, *rows, caches, heads, tile)
    return Shapes(heads, q.shape[0] * q.shape[1], rows, caches, sizes, tile, same)


def _row_strides(tensor: torch.Tensor, size: int) -> tuple[int, ...] | None:
    """Strides of token and head of [b, s, heads, size] or [b, s, heads * size]; None when there are none.

    The heads of a token must lie within 32-bit offsets.
    """
    batch, sequence = tensor.shape[:2]
    outer, inner = tensor.stride()[:2]
    if tensor.stride(-1) != 1 or (batch > 1 and sequence > 1 and outer != sequence * inner):
        return None if tensor.numel() else (0, 0)
    heads, head = (tensor.shape[2], tensor.stride(2)) if tensor.dim() == 4 else (tensor.shape[2] // size, size)
    if heads * head >= 2**31:
        return None
    return _strides((inner if sequence > 1 else outer, head), (batch * sequence, heads))


def _strides(strides, counts) -> tuple[int, ...]:
    """0 for a dimension of one entry, whose stride says nothing: fewer kernels are compiled."""
    return tuple(stride if count > 1 else 0 for stride, count in zip(strides, counts, strict=True))
