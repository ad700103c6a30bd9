"""Attention over an unpaged cache by our own Triton kernels: flash-decoding and a variable-length prefill.

Nothing waits for the device and no launch depends on device data, so a decode step can be captured in a CUDA graph.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardwise.ops.attention import tiles
from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.attention.checks import Heads, cached_output_shape, check_cached, default_scale, fake_cached, shape
from shardwise.ops.attention.kernels.append import append_kernel
from shardwise.ops.attention.kernels.decode import decode_kernel, reduce_kernel
from shardwise.ops.attention.kernels.prefill import prefill_kernel
from shardwise.ops.attention.tiles import Tile
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Launcher, aligned, dependent_launch

OP = "triton_attention_flattened_mha_with_cache"
LOG2_E = math.log2(math.e)
APPEND_TOKENS = 16

_append, _prefill, _decode, _reduce = (
    Launcher(kernel) for kernel in (append_kernel, prefill_kernel, decode_kernel, reduce_kernel)
)


@dataclass(frozen=True, slots=True)
class _Call:
    """What follows from shapes, strides and dtypes alone; remembered, since checking costs more than launching."""

    heads: Heads
    tokens: int
    """T, padding included"""
    out_shape: tuple[int, ...]
    copy: bool
    """Whether q, k or v must be made contiguous first: their tokens or heads have no common stride"""
    rows: tuple[tuple[int, ...], ...]
    """q, k and v: strides of token and head"""
    caches: tuple[tuple[int, ...], ...]
    """k_cache and v_cache: strides of slot, position and head"""
    sizes: tuple[int, ...]
    """D, Dv and the powers of two that hold them"""
    decode_tile: Tile
    form: int
    """A number for dtypes, strides, heads and tile: equal forms take the same compiled kernels"""


_CALLS: dict[tuple, _Call] = {}
_FORMS: dict[tuple, int] = {}


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
    device and are not checked: a sequence that would leave the cache is not read and gives 0, like slot -1.
    """
    batch = read_batch(OP, batch_info_host)
    call = _call(q, k, v, k_cache, v_cache, sinks)
    if call.copy:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        call = _call(q, k, v, k_cache, v_cache, sinks)
    if batch.tokens > call.tokens:
        raise ValueError(f"{OP}: batch_info_host counts {batch.tokens} tokens, q holds {call.tokens}")
    out = torch.empty(call.out_shape, dtype=q.dtype, device=q.device)
    if batch.tokens < call.tokens:
        out.view(call.tokens, -1)[batch.tokens :].zero_()
    step = _Step(
        call,
        batch,
        (q, k, v, k_cache, v_cache, out),
        input_pos,
        slot_idx,
        None if sinks is None else sinks.contiguous(),
        default_scale(scale, call.heads.size) * LOG2_E,
        sliding_window if sliding_window and sliding_window > 0 else 0,
    )
    if batch.prefill_tokens:
        step.run_prefill(seq_len)
    if batch.decode:
        step.run_decode()
    return out


def _call(q, k, v, k_cache, v_cache, sinks) -> _Call:
    key = (
        q.shape, k.shape, v.shape, k_cache.shape, v_cache.shape,
        q.dtype, k.dtype, v.dtype, k_cache.dtype, v_cache.dtype,
        q.stride(), k.stride(), v.stride(), k_cache.stride(), v_cache.stride(),
        None if sinks is None else (sinks.shape, sinks.dtype),
    )  # fmt: skip
    call = _CALLS.get(key)
    if call is None:
        if len(_CALLS) >= 4096:  # prefill lengths are many
            _CALLS.clear()
        call = _CALLS[key] = _describe(q, k, v, k_cache, v_cache, sinks)
    return call


def _describe(q, k, v, k_cache, v_cache, sinks) -> _Call:
    heads = check_cached(OP, q, k, v, k_cache, v_cache, sinks)
    if q.dtype == torch.float64:
        raise TypeError(f"{OP}: q is torch.float64; legal: float16, bfloat16, float32")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            raise ValueError(
                f"{OP}: {name} {shape(cache)} has stride {cache.stride(3)} in its last dimension; legal: 1"
            )
    rows = [_row_strides(x, size) for x, size in ((q, heads.size), (k, heads.size), (v, heads.value_size))]
    caches = tuple(_strides(cache.stride()[:3], cache.shape[:3]) for cache in (k_cache, v_cache))
    sizes = (heads.size, heads.value_size, tiles.power_of_two(heads.size), tiles.power_of_two(heads.value_size))
    dtypes = (q.dtype, k_cache.dtype, v_cache.dtype, None if sinks is None else sinks.dtype)
    tile = tiles.decode_tile(heads.group, heads.size, heads.value_size, q.element_size())
    return _Call(
        heads=heads,
        tokens=q.shape[0] * q.shape[1],
        out_shape=tuple(cached_output_shape(q, k_cache, v_cache)),
        copy=None in rows,
        rows=tuple(row or (0, 0) for row in rows),
        caches=caches,
        sizes=sizes,
        decode_tile=tile,
        form=_FORMS.setdefault((dtypes, *rows, caches, heads, tile), len(_FORMS)),
    )


def _row_strides(tensor: torch.Tensor, size: int) -> tuple[int, ...] | None:
    """Strides of token and head of [b, s, heads, size] or [b, s, heads * size]; None when there are none."""
    batch, sequence = tensor.shape[:2]
    outer, inner = tensor.stride()[:2]
    if tensor.stride(-1) != 1 or (batch > 1 and sequence > 1 and outer != sequence * inner):
        return None if tensor.numel() else (0, 0)
    heads, head = (tensor.shape[2], tensor.stride(2)) if tensor.dim() == 4 else (tensor.shape[2] // size, size)
    return _strides((inner if sequence > 1 else outer, head), (batch * sequence, heads))


def _strides(strides, counts) -> tuple[int, ...]:
    """0 for a dimension of one entry, whose stride says nothing: fewer kernels are compiled."""
    return tuple(stride if count > 1 else 0 for stride, count in zip(strides, counts, strict=True))


class _Step(NamedTuple):
    """One call, ready to be launched."""

    call: _Call
    batch: Batch
    tensors: tuple[torch.Tensor, ...]
    """q, k, v, k_cache, v_cache, out"""
    input_pos: torch.Tensor
    slot_idx: torch.Tensor
    sinks: torch.Tensor | None
    scale: float
    window: int

    def _key(self, *more) -> tuple:
        pointers = (*self.tensors, self.input_pos, self.slot_idx)
        sinks = None if self.sinks is None else aligned(self.sinks)
        return (
            self.call.form,
            aligned(*pointers),
            self.input_pos.dtype,
            self.slot_idx.dtype,
            sinks,
            self.window,
            *more,
        )

    def _check(self, name: str, tensor: torch.Tensor | None, count: int) -> None:
        device = self.tensors[0].device
        if tensor is None or tensor.numel() < count or tensor.device != device:
            came = "None" if tensor is None else f"{tensor.numel()} entries on {tensor.device}"
            raise ValueError(f"{OP}: {name} is {came}; legal: an entry for each of the {count} sequences on {device}")

    def run_prefill(self, seq_len: torch.Tensor) -> None:
        batch, call = self.batch, self.call
        for name, tensor in (("seq_len", seq_len), ("input_pos", self.input_pos), ("slot_idx", self.slot_idx)):
            self._check(name, tensor, batch.prefill)
        q, k, v, k_cache, v_cache, out = self.tensors
        heads, pdl = call.heads, dependent_launch(q.device)
        sequences = min(256, tiles.power_of_two(batch.prefill))
        key = self._key(seq_len.dtype, aligned(seq_len), sequences)
        limits = (batch.prefill, k_cache.shape[0], k_cache.shape[1])
        _append(
            q.device, key, (-(-batch.prefill_tokens // APPEND_TOKENS), heads.keys, 1),
            (k, v, k_cache, v_cache, seq_len, self.input_pos, self.slot_idx, batch.prefill_tokens, *limits,
             *call.rows[1:], *call.caches, *call.sizes, APPEND_TOKENS, sequences, pdl),
            num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
        rows = batch.prefill_tokens * heads.group
        tile = tiles.prefill_tile(rows // batch.prefill, heads.size, heads.value_size, q.element_size())
        count = -(-rows // tile.rows) + batch.prefill  # each sequence may end in a part tile
        _prefill(
            q.device, (*key, tile), (count * heads.keys, 1, 1),
            (q, k_cache, v_cache, out, seq_len, self.input_pos, self.slot_idx, q if self.sinks is None else self.sinks,
             self.scale, count, batch.prefill_tokens, *limits, call.rows[0], *call.caches, heads.keys, heads.group,
             *call.sizes, tile.rows, tile.keys, sequences, self.window, self.sinks is not None, pdl),
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip

    def run_decode(self) -> None:
        batch, call, tile = self.batch, self.call, self.call.decode_tile
        self._check("input_pos", self.input_pos, batch.sequences)
        self._check("slot_idx", self.slot_idx, batch.sequences)
        q, k, v, k_cache, v_cache, out = self.tensors
        heads, pdl = call.heads, dependent_launch(q.device)
        slots, max_seq = k_cache.shape[:2]
        reach = min(max_seq, self.window) if self.window else max_seq
        splits = tiles.choose_splits(batch.decode * heads.keys, tiles.resident_programs(q.device), reach, tile.keys)
        rows = batch.decode * heads.queries * splits
        partial = out
        if splits > 1:
            partial = torch.empty(rows * (heads.value_size + 1), dtype=torch.float32, device=q.device)
        block_splits = tiles.power_of_two(splits, 2)
        key = self._key(splits > 1, block_splits)
        sinks = q if self.sinks is None else self.sinks
        place = (batch.prefill, batch.prefill_tokens, slots, max_seq, rows, splits)
        _decode(
            q.device, key, (batch.decode * heads.keys * splits, 1, 1),
            (q, k, v, k_cache, v_cache, out, partial, self.input_pos, self.slot_idx, sinks, self.scale, *place,
             *call.rows, *call.caches, heads.keys, heads.group, *call.sizes, tile.rows, tile.keys,
             splits > 1, self.window, self.sinks is not None, pdl),
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip
        if splits > 1:
            _reduce(
                q.device, key, (batch.decode * heads.queries, 1, 1),
                (partial, out, self.input_pos, self.slot_idx, sinks, *place, heads.queries, heads.value_size,
                 tile.keys, call.sizes[3], block_splits, self.window, self.sinks is not None, pdl),
                num_warps=4, launch_pdl=pdl,
            )  # fmt: skip
