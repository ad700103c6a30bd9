"""Attention over an unpaged cache by our own Triton kernels: flash-decoding and a variable-length prefill.

Nothing waits for the device and no launch depends on device data, so a decode step can be captured in a CUDA graph.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from shardwise.ops.attention import tiles
from shardwise.ops.attention.batch import Batch, read_batch, read_spans
from shardwise.ops.attention.checks import Heads, cached_output_shape, check_cached, default_scale, fake_cached, shape
from shardwise.ops.attention.kernels.append import append_kernel
from shardwise.ops.attention.kernels.decode import flattened_decode_kernel, reduce_kernel
from shardwise.ops.attention.kernels.prefill import prefill_kernel
from shardwise.ops.attention.tiles import Tile
from shardwise.ops.metadata_reports import raise_report, read_at_once, report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Form, Kernel, dependent_launch, multiprocessors

OP = "triton_attention_flattened_mha_with_cache"
LOG2_E = math.log2(math.e)
APPEND_TOKENS = 16
MOST_STRIDE = 2**24  # the kernels reach 128 positions with 32-bit offsets

_append, _prefill, _decode, _reduce = (
    Kernel(kernel) for kernel in (append_kernel, prefill_kernel, flattened_decode_kernel, reduce_kernel)
)


@dataclass(slots=True)
class _Call:
    """What follows from shapes, strides and dtypes alone; remembered, since checking costs more than launching."""

    heads: Heads
    tokens: int
    """T, padding included"""
    out_shape: torch.Size
    copy: bool
    """Whether q, k or v must be made contiguous first: their tokens or heads have no common stride"""
    rows: tuple[tuple[int, ...], ...]
    """q, k and v: strides of token and head"""
    caches: tuple[tuple[int, ...], ...]
    """k_cache and v_cache: strides of slot, position and head"""
    sizes: tuple[int, ...]
    """D, Dv and the powers of two that hold them"""
    decode_tile: Tile
    same: tuple
    """Dtypes, strides, heads and tile: where these are equal the same compiled kernels serve"""
    decodes: dict[Hashable, "_Decode"] = field(default_factory=dict)
    """What decode steps of this shape launch"""
    prefills: dict[Hashable, "_Prefill"] = field(default_factory=dict)
    """What its prefill sequences launch"""


_CALLS: dict[tuple, _Call] = {}
_FORMS: dict[tuple, Form] = {}


def _form(kernel: Kernel, device: torch.device, key: tuple, fixed: tuple, **options) -> Form:
    """The form for `key`, which covers `fixed`, the dtypes of the pointers, and the options."""
    key = (kernel, device, *key)
    form = _FORMS.get(key)
    if form is None:
        form = _FORMS[key] = kernel.form(device, fixed, pdl=dependent_launch(device), **options)
    return form


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
    device: a sequence that would leave the cache is not read and gives 0, like slot -1, and the next call raises
    ValueError for it (`metadata_reports.py`).
    """
    raise_report(OP)
    batch = read_batch(OP, batch_info_host)
    call = _call(q, k, v, k_cache, v_cache, sinks)
    if call.copy:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        call = _call(q, k, v, k_cache, v_cache, sinks)
    if batch.tokens > call.tokens:
        raise ValueError(f"{OP}: batch_info_host counts {batch.tokens} tokens, q holds {call.tokens}")
    if read_at_once(q):
        read_spans(OP, batch, call.tokens, seq_len, input_pos, slot_idx, k_cache.shape)
    if call.out_shape == q.shape:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # half the host time of torch.empty
    else:
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
        if cache.stride(1) >= MOST_STRIDE:
            raise ValueError(f"{OP}: {name} {shape(cache)} has stride {cache.stride(1)} between positions; legal: less "
                             f"than {MOST_STRIDE}")  # fmt: skip
    rows = [_row_strides(x, size) for x, size in ((q, heads.size), (k, heads.size), (v, heads.value_size))]
    caches = tuple(_strides(cache.stride()[:3], cache.shape[:3]) for cache in (k_cache, v_cache))
    sizes = (heads.size, heads.value_size, tiles.power_of_two(heads.size), tiles.power_of_two(heads.value_size))
    dtypes = (q.dtype, k_cache.dtype, v_cache.dtype, None if sinks is None else sinks.dtype)
    tile = tiles.decode_tile(heads.group, heads.size, heads.value_size, q.element_size())
    return _Call(
        heads=heads,
        tokens=q.shape[0] * q.shape[1],
        out_shape=torch.Size(cached_output_shape(q, k_cache, v_cache)),
        copy=None in rows,
        rows=tuple(row or (0, 0) for row in rows),
        caches=caches,
        sizes=sizes,
        decode_tile=tile,
        same=(dtypes, *rows, caches, heads, tile),
    )


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


class _Decode(NamedTuple):
    """The launches of one decode step, but for its tensors."""

    form: Form
    grid: tuple[int, int, int]
    splits: int
    rows: int
    """Rows of the split results: sequences x heads x splits"""
    reduce: Form | None
    """Joins the splits, where there are several"""


class _Prefill(NamedTuple):
    """The launches of one step's prefill sequences, but for its tensors."""

    append: Form
    append_grid: tuple[int, int, int]
    attend: Form
    tiles: int
    """Tiles of rows (tokens x heads of a group), for each KV head"""


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

    def _each(self, name: str, tensor: torch.Tensor | None, count: int) -> torch.Tensor:
        """`tensor`, which must have an entry for each of `count` sequences; the kernels read it as contiguous."""
        device = self.tensors[0].device
        if tensor is None or tensor.numel() < count or tensor.device != device:
            came = "None" if tensor is None else f"{tensor.numel()} entries on {tensor.device}"
            raise ValueError(f"{OP}: {name} is {came}; legal: an entry for each of the {count} sequences on {device}")
        return tensor.contiguous()

    def run_prefill(self, seq_len: torch.Tensor) -> None:
        batch, call = self.batch, self.call
        given = ("seq_len", seq_len), ("input_pos", self.input_pos), ("slot_idx", self.slot_idx)
        metadata = tuple(self._each(name, tensor, batch.prefill) for name, tensor in given)
        q, k, v, k_cache, v_cache, out = self.tensors
        key = (batch.prefill, batch.prefill_tokens, self.window, *[tensor.dtype for tensor in metadata])
        plan = call.prefills.get(key)
        if plan is None:
            plan = call.prefills[key] = self._plan_prefill(metadata)
        limits = (batch.prefill, k_cache.shape[0], k_cache.shape[1])
        word = report_word(OP)
        plan.append(plan.append_grid, (k, v, k_cache, v_cache, *metadata, word), (batch.prefill_tokens, *limits))
        plan.attend(
            (plan.tiles * call.heads.keys, 1, 1),
            (q, k_cache, v_cache, out, *metadata, q if self.sinks is None else self.sinks),
            (self.scale, plan.tiles, batch.prefill_tokens, *limits),
        )

    def _plan_prefill(self, metadata: tuple[torch.Tensor, ...]) -> _Prefill:
        batch, call, heads, q = self.batch, self.call, self.call.heads, self.tensors[0]
        sequences, pdl = min(256, tiles.power_of_two(batch.prefill)), dependent_launch(q.device)
        key = (call.same, *(tensor.dtype for tensor in metadata), self.window, sequences)
        append = _form(
            _append, q.device, key,
            (*call.rows[1:], *call.caches, *call.sizes, APPEND_TOKENS, sequences, pdl), warps=4,
        )  # fmt: skip
        rows = batch.prefill_tokens * heads.group
        tile = tiles.prefill_tile(rows // batch.prefill, heads.size, heads.value_size, q.element_size())
        attend = _form(
            _prefill, q.device, (*key, tile),
            (call.rows[0], *call.caches, heads.keys, heads.group, *call.sizes, tile.rows, tile.keys, sequences,
             self.window, self.sinks is not None, pdl),
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        count = -(-rows // tile.rows) + batch.prefill  # each sequence may end in a part tile
        return _Prefill(append, (-(-batch.prefill_tokens // APPEND_TOKENS), heads.keys, 1), attend, count)

    def run_decode(self) -> None:
        batch, call = self.batch, self.call
        input_pos = self._each("input_pos", self.input_pos, batch.sequences)
        slot_idx = self._each("slot_idx", self.slot_idx, batch.sequences)
        q, k, v, k_cache, v_cache, out = self.tensors
        key = (batch.decode, self.window, input_pos.dtype, slot_idx.dtype)
        plan = call.decodes.get(key)
        if plan is None:
            plan = call.decodes[key] = self._plan_decode()
        partial = out
        if plan.reduce is not None:
            partial = torch.empty(plan.rows * (call.heads.value_size + 1), dtype=torch.float32, device=q.device)
        place = (batch.prefill, batch.prefill_tokens, k_cache.shape[0], k_cache.shape[1], plan.rows, plan.splits)
        metadata = (input_pos, slot_idx, q if self.sinks is None else self.sinks)
        word = report_word(OP)
        plan.form(plan.grid, (q, k, v, k_cache, v_cache, out, partial, *metadata, word), (self.scale, *place))
        if plan.reduce is not None:
            plan.reduce((batch.decode * call.heads.queries, 1, 1), (partial, out, *metadata), place)

    def _plan_decode(self) -> _Decode:
        call, tile, heads = self.call, self.call.decode_tile, self.call.heads
        q, max_seq, decode = self.tensors[0], self.tensors[3].shape[1], self.batch.decode
        reach = min(max_seq, self.window) if self.window else max_seq
        splits = tiles.choose_splits(decode * heads.keys, multiprocessors(q.device), reach, tile.keys)
        several, block_splits = splits > 1, tiles.power_of_two(splits, 2)
        key = (call.same, self.window, self.input_pos.dtype, self.slot_idx.dtype)
        options = (self.window, self.sinks is not None, dependent_launch(q.device))
        form = _form(
            _decode, q.device, (*key, several),
            (*call.rows, *call.caches, heads.keys, heads.group, *call.sizes, tile.rows, tile.keys, several, *options),
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        reduce = _form(
            _reduce, q.device, (*key, block_splits),
            (heads.queries, heads.value_size, tile.keys, call.sizes[3], block_splits, *options), warps=4,
        ) if several else None  # fmt: skip
        rows = decode * heads.queries * splits
        return _Decode(form, (decode * heads.keys * splits, 1, 1), splits, rows, reduce)
