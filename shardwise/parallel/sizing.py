"""How many sequences and pages the cache gets of what weights and activations leave of a GPU."""

from bisect import bisect_right

import torch

from shardwise.comm.base import Communicator
from shardwise.parallel.cache import LayerShape
from shardwise.parallel.device_cache import PAGE_SIZE
from shardwise.parallel.host_memory import DoesNotFit
from shardwise.parallel.paged import pool_pages
from shardwise.sharding import spec
from shardwise.sharding.model import Layer, ModelSpec

RESERVED_BYTES = 2 << 30
"""For CUDA graphs, communication, library workspaces and what the allocator cannot use."""


def cache_bytes(layers: list[LayerShape], dtype: torch.dtype, *, pages: int, slots: int) -> int:
    """Of a GPU's cache with `pages` pages, and the states of `slots` sequences."""
    return slots * _state_bytes(layers, dtype) + _pool_bytes(layers, dtype, pages=pages, slots=slots)


def _pool_bytes(layers: list[LayerShape], dtype: torch.dtype, *, pages: int, slots: int) -> int:
    """Of keys and values."""
    return sum(
        pool_pages(s.window, pages=pages, slots=slots, page_size=PAGE_SIZE) * PAGE_SIZE * s.width * dtype.itemsize
        for s in layers
    )


def _state_bytes(layers: list[LayerShape], dtype: torch.dtype) -> int:
    """Of a sequence."""
    return sum(shape.state.nbytes(dtype) for shape in layers if shape.state)


def slots_for(
    layers: list[LayerShape],
    dtype: torch.dtype,
    *,
    most: int,
    pages: int | None,
    activations: int,
    world: Communicator,
    device: torch.device,
) -> int:
    """Sequences that run at once on every rank: `most`, or as many as there is room for the states of.

    That is what `pages` pages leave, or half of the memory that the cache gets, where these take the rest (None).
    DoesNotFit, on all ranks, when there is none for one sequence on some rank.
    """
    state = _state_bytes(layers, dtype)
    if not state or device.type != "cuda":
        return most
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = free - RESERVED_BYTES - activations
    left = left // 2 if pages is None else left - _pool_bytes(layers, dtype, pages=pages, slots=most)
    fits = world.all_gather_object(left // state)
    if min(fits) < 1:
        raise DoesNotFit(
            f"rank {world.ranks[fits.index(min(fits))]} has no memory for the states of a sequence, {state >> 20} MiB: "
            f"beside the weights, rank {world.ranks[world.rank]} has {free >> 20} MiB of {total >> 20} MiB, and the "
            "rest is kept for keys and values, activations and workspaces; use "
            f"{'' if pages is None else 'fewer cache_tokens, '}more ranks or smaller weights"
        )
    return min(most, *fits)


def pages_for(
    layers: list[LayerShape],
    dtype: torch.dtype,
    *,
    slots: int,
    max_length: int,
    activations: int,
    world: Communicator,
    device: torch.device,
) -> int:
    """Pages that fit on every rank, at most those that `slots` sequences of `max_length` tokens can use.

    DoesNotFit, on all ranks, when not one fits on some rank.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    work = RESERVED_BYTES + activations
    useful = range(1, slots * -(-max_length // PAGE_SIZE) + 1)
    held = bisect_right(useful, free - work, key=lambda pages: cache_bytes(layers, dtype, pages=pages, slots=slots))
    fits = world.all_gather_object(held)
    if min(fits) < 1:
        rank, each = fits.index(min(fits)), cache_bytes(layers, dtype, pages=1, slots=slots)
        states = f" and the states of {slots} sequences" if any(shape.state for shape in layers) else ""
        raise DoesNotFit(
            f"rank {world.ranks[rank]} has no memory for the cache, of which {PAGE_SIZE} tokens{states} take {each} "
            f"bytes: beside the weights, rank {world.ranks[world.rank]} has {free >> 20} MiB of {total >> 20} MiB, and "
            f"{work >> 20} MiB are kept for activations and workspaces; use more ranks or smaller weights"
        )
    return min(fits)


def activation_bytes(model: ModelSpec, tokens: int, dtype: torch.dtype) -> int:
    """An upper bound of what a step of so many tokens has alive at once: the widest layer's, and a batch's logits."""
    widest = max((_inner_elements(layer, model.hidden) for layer in model.layers), default=0)
    return tokens * (8 * model.hidden + widest) * dtype.itemsize + 64 * model.vocab * 8


def _inner_elements(layer: Layer, hidden: int) -> int:
    """Elements a token of a layer's projections, each with its activation."""
    found = [0]
    for block in (*layer.mixers, *layer.feed_forward):
        if isinstance(block, spec.Attention):
            found.append(2 * (block.heads + block.kv_heads) * (block.head_dim + block.v_head_dim))
        elif isinstance(block, spec.MlaAttention):
            found.append(4 * block.heads * (block.kv_rank + block.rope_dim))
        elif isinstance(block, spec.Mamba2):  # each chunk of the scan has a state, in float32
            states = 2 * block.head_dim * block.state // block.chunk
            inner = block.head_axis.units * (block.head_dim + 1) + block.group_axis.units * block.state
            found.append(4 * inner + block.head_axis.units * states)
        elif isinstance(block, spec.GatedDelta):  # queries and keys twice, normed; values in float32 on their way
            keys, values = block.k_axis.units * block.k_head_dim, block.v_axis.units * block.v_head_dim
            found.append(8 * keys + 8 * values)
        elif isinstance(block, spec.Moe):  # results of a token's experts wait in float32 to be summed
            found.append(block.routing.top_k * (4 * block.mlp_axis.units + 2 * hidden))
        elif isinstance(block, spec.DenseMlp):
            found.append(4 * block.mlp_axis.units)
    return max(found)
