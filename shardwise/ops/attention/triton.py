"""Attention over an unpaged cache by our own Triton kernels: flash-decoding and a variable-length prefill.

Nothing waits for the device and no launch depends on device data, so a decode step can be captured in a CUDA graph.
"""

import math
from dataclasses import dataclass

import torch

from shardwise.ops.attention import tiles
from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.attention.checks import Heads, check_cached, default_scale, fake_cached, shape
from shardwise.ops.attention.kernels.append import append_kernel
from shardwise.ops.attention.kernels.decode import decode_kernel, reduce_kernel
from shardwise.ops.attention.kernels.prefill import prefill_kernel
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Launcher, aligned, dependent_launch

OP = "triton_attention_flattened_mha_with_cache"
LOG2_E = math.log2(math.e)
APPEND_TOKENS = 16

_append, _prefill, _decode, _reduce = (
    Launcher(kernel) for kernel in (append_kernel, prefill_kernel, decode_kernel, reduce_kernel)
)


@dataclass(frozen=True)
class _Call:
    """What follows from shapes, strides and dtypes alone; remembered, since checking costs more than launching."""

    heads: Heads
    blocks: tuple[int, int]
    """BLOCK_D, BLOCK_DV"""
    strides: tuple[tuple[int, ...], ...]
    """q, k, v by token and head; k_cache, v_cache by slot, position and head"""
    constants: tuple
    """Key part: dtypes, strides and heads"""


_CALLS: dict[tuple, _Call] = {}


def _fake(
    q,
    k,
    v,
    batch_info_host,
    seq_len,
    input_pos,
    slot_idx,
    cu_seqlen,
    k_cache,
    v_cache,
    scale,
    sinks=None,
    sliding_window=None,
):
    return fake_cached(q, k_cache, v_cache)


@operator(fake=_fake, mutates=("k_cache", "v_cache"), needs=(TRITON,), instead="torch_cached_attention_with_cache")
def triton_attention_flattened_mha_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    slot_idx: torch.Tensor,
    cu_seqlen: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float | None,
    sinks: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Append k and v to an unpaged cache and attend to it, causally.

    Tensors and meaning are those of `torch_cached_attention_with_cache`, without a logit cap. float16, bfloat16 or
    float32; the caches may be float8_e4m3fn. `cu_seqlen` is not read. Lengths, positions and slots stay on the
    device and are not checked: a sequence that would leave the cache is not stored and gives 0, like slot -1.
    """
    batch = read_batch(OP, batch_info_host)
    tokens = q.shape[0] * q.shape[1]
    if batch.tokens > tokens:
        raise ValueError(f"{OP}: batch_info_host counts {batch.tokens} tokens, q holds {tokens}")
    q_flat, k_flat, v_flat = _flatten(q, k_cache), _flatten(k, k_cache), _flatten(v, v_cache)
    call = _call(q, k, v, q_flat, k_flat, v_flat, k_cache, v_cache, sinks)
    out = fake_cached(q, k_cache, v_cache)
    if batch.tokens < tokens:
        out.view(tokens, -1)[batch.tokens :].zero_()
    step = _Step(
        call, batch, q_flat, k_flat, v_flat, k_cache, v_cache, out, seq_len, input_pos, slot_idx,
        sinks if sinks is None or sinks.is_contiguous() else sinks.contiguous(),
        default_scale(scale, call.heads.size) * LOG2_E, max(sliding_window or 0, 0),
    )  # fmt: skip
    if batch.prefill_tokens:
        step.run_prefill()
    if batch.decode:
        step.run_decode()
    return out


def _flatten(tensor: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """[b, s, heads, D] or [b, s, heads * D] -> [T, heads, D] with adjacent elements; a view where possible."""
    if tensor.dim() not in (3, 4) or tensor.numel() == 0 or tensor.shape[-1] % cache.shape[-1]:
        return tensor
    flat = tensor.reshape(tensor.shape[0] * tensor.shape[1], -1, cache.shape[-1])
    return flat if flat.stride(2) == 1 else flat.contiguous()


def _call(q, k, v, q_flat, k_flat, v_flat, k_cache, v_cache, sinks) -> _Call:
    key = (
        q.shape, k.shape, v.shape, k_cache.shape, v_cache.shape,
        q.dtype, k.dtype, v.dtype, k_cache.dtype, v_cache.dtype,
        q_flat.stride(), k_flat.stride(), v_flat.stride(), k_cache.stride(), v_cache.stride(),
        None if sinks is None else (sinks.shape, sinks.dtype),
    )  # fmt: skip
    call = _CALLS.get(key)
    if call is None:
        if len(_CALLS) >= 4096:  # prefill lengths are many
            _CALLS.clear()
        call = _CALLS[key] = _describe(q, k, v, q_flat, k_flat, v_flat, k_cache, v_cache, sinks)
    return call


def _describe(q, k, v, q_flat, k_flat, v_flat, k_cache, v_cache, sinks) -> _Call:
    heads = check_cached(OP, q, k, v, k_cache, v_cache, sinks)
    if q.dtype == torch.float64:
        raise TypeError(f"{OP}: q is torch.float64; legal: float16, bfloat16, float32")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            raise ValueError(
                f"{OP}: {name} {shape(cache)} has stride {cache.stride(3)} in its last dimension; legal: 1"
            )
    strides = (
        *(_strides(flat, 2) for flat in (q_flat, k_flat, v_flat)),
        *(_strides(cache, 3) for cache in (k_cache, v_cache)),
    )
    dtypes = (q.dtype, k_cache.dtype, v_cache.dtype, None if sinks is None else sinks.dtype)
    blocks = (tiles.power_of_two(heads.size), tiles.power_of_two(heads.value_size))
    return _Call(heads, blocks, strides, (dtypes, strides, heads))


def _strides(tensor: torch.Tensor, count: int) -> tuple[int, ...]:
    """The first strides; 0 for a dimension of one entry, whose stride says nothing."""
    return tuple(s if n > 1 else 0 for s, n in zip(tensor.stride()[:count], tensor.shape[:count], strict=True))


@dataclass(frozen=True)
class _Step:
    """One call's tensors, ready to be launched."""

    call: _Call
    batch: Batch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    out: torch.Tensor
    seq_len: torch.Tensor
    input_pos: torch.Tensor
    slot_idx: torch.Tensor
    sinks: torch.Tensor | None
    scale: float
    window: int

    def _key(self, *more) -> tuple:
        pointers = (self.q, self.k, self.v, self.k_cache, self.v_cache, self.out, self.input_pos, self.slot_idx)
        dtypes = (self.input_pos.dtype, self.slot_idx.dtype)
        sinks = None if self.sinks is None else aligned(self.sinks)
        return (self.call.constants, aligned(*pointers), dtypes, sinks, self.window, more)

    def _check(self, name: str, tensor: torch.Tensor | None, count: int) -> None:
        if tensor is None or tensor.numel() < count or tensor.device != self.q.device:
            came = "None" if tensor is None else f"{tensor.numel()} entries on {tensor.device}"
            raise ValueError(
                f"{OP}: {name} is {came}; legal: an entry for each of the {count} sequences on {self.q.device}"
            )

    def run_prefill(self) -> None:
        batch, heads, (block_d, block_dv) = self.batch, self.call.heads, self.call.blocks
        self._check("seq_len", self.seq_len, batch.prefill)
        self._check("input_pos", self.input_pos, batch.prefill)
        self._check("slot_idx", self.slot_idx, batch.prefill)
        q_strides, k_strides, v_strides, k_cache_strides, v_cache_strides = self.call.strides
        device, pdl = self.q.device, dependent_launch(self.q.device)
        sequences = min(256, tiles.power_of_two(batch.prefill))
        key = self._key(self.seq_len.dtype, aligned(self.seq_len), sequences)
        limits = (batch.prefill, self.k_cache.shape[0], self.k_cache.shape[1])
        _append(
            device, key, (-(-batch.prefill_tokens // APPEND_TOKENS), heads.keys, 1),
            (self.k, self.v, self.k_cache, self.v_cache, self.seq_len, self.input_pos, self.slot_idx,
             batch.prefill_tokens, *limits, k_strides, v_strides, k_cache_strides, v_cache_strides,
             heads.size, heads.value_size, block_d, block_dv, APPEND_TOKENS, sequences, pdl),
            num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
        rows = batch.prefill_tokens * heads.group
        tile = tiles.prefill_tile(rows // batch.prefill, heads.size, heads.value_size, self.q.element_size())
        count = -(-rows // tile.rows) + batch.prefill  # each sequence may end in a part tile
        _prefill(
            device, (*key, tile), (count * heads.keys, 1, 1),
            (self.q, self.k_cache, self.v_cache, self.out, self.seq_len, self.input_pos, self.slot_idx,
             self.q if self.sinks is None else self.sinks, self.scale, count, *limits,
             q_strides, k_cache_strides, v_cache_strides, heads.keys, heads.group, heads.size, heads.value_size,
             tile.rows, tile.keys, block_d, block_dv, sequences, self.window, self.sinks is not None, pdl),
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip

    def run_decode(self) -> None:
        batch, heads, (block_d, block_dv) = self.batch, self.call.heads, self.call.blocks
        self._check("input_pos", self.input_pos, batch.sequences)
        self._check("slot_idx", self.slot_idx, batch.sequences)
        device, pdl = self.q.device, dependent_launch(self.q.device)
        tile = tiles.decode_tile(heads.group, heads.size, heads.value_size, self.q.element_size())
        slots, max_seq = self.k_cache.shape[:2]
        reach = min(max_seq, self.window) if self.window else max_seq
        splits = tiles.choose_splits(batch.decode * heads.keys, tiles.resident_programs(device), reach, tile.keys)
        rows = batch.decode * heads.queries * splits
        partial = self.out if splits == 1 else self.q.new_empty(rows * (heads.value_size + 1), dtype=torch.float32)
        key = self._key(tile, splits > 1, tiles.power_of_two(splits, 2))
        sinks = self.q if self.sinks is None else self.sinks
        place = (batch.prefill, batch.prefill_tokens, slots, max_seq, rows, splits)
        _decode(
            device, key, (batch.decode * heads.keys * splits, 1, 1),
            (self.q, self.k, self.v, self.k_cache, self.v_cache, self.out, partial, self.input_pos, self.slot_idx,
             sinks, self.scale, *place, *self.call.strides, heads.keys, heads.group, heads.size, heads.value_size,
             tile.rows, tile.keys, block_d, block_dv, splits > 1, self.window, self.sinks is not None, pdl),
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
        if splits > 1:
            _reduce(
                device, key, (batch.decode * heads.queries, 1, 1),
                (partial, self.out, self.input_pos, self.slot_idx, sinks, *place, heads.queries, heads.value_size,
                 tile.keys, block_dv, tiles.power_of_two(splits, 2), self.window, self.sinks is not None, pdl),
                num_warps=4, launch_pdl=pdl,
            )  # fmt: skip
