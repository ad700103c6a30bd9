"""Attention over an unpaged cache by our own Triton kernels: flash-decoding and a variable-length prefill.

Nothing waits for the device and no launch depends on device data, so a decode step can be captured in a CUDA graph.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from shardwise.ops.attention import tiles
from shardwise.ops.attention.batch import Batch, read_batch, read_spans
from shardwise.ops.attention.checks import Heads, cached_output_shape, check_cached, default_scale, fake_cached, shape
from shardwise.ops.attention.kernels.append import append_kernel
from shardwise.ops.attention.kernels.decode import flattened_decode_kernel, reduce_kernel
from shardwise.ops.attention.kernels.prefill import prefill_kernel
from shardwise.ops.attention.tiles import Tile
from shardwise.ops.devices import require_one_device
from shardwise.ops.metadata_reports import raise_report, read_at_once, report_word
from shardwise.ops.plan_cache import PlanCache, Tensors, allocator
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import Form, Kernel, Launch, dependent_launch, multiprocessors

OP = "triton_attention_flattened_mha_with_cache"
LOG2_E = math.log2(math.e)
APPEND_TOKENS = 16
LEAST_SCALE = 1e-30  # for 0: the kernels order scores before they scale them, and hide keys by scores of -inf
MOST_STRIDE = 2**24  # the kernels reach 128 positions with 32-bit offsets

_append, _prefill, _decode, _reduce = (
    Kernel(kernel) for kernel in (append_kernel, prefill_kernel, flattened_decode_kernel, reduce_kernel)
)


class _Shapes(NamedTuple):
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


class _Prefill(NamedTuple):
    """What a step's prefill sequences launch, but for its tensors."""

    append: Launch
    attend: Launch


class _Decode(NamedTuple):
    """What a step's decode sequences launch, but for its tensors."""

    attend: Launch
    partial: Callable[[], torch.Tensor] | None
    """Allocates the splits' results, where there are several"""
    reduce: Launch | None
    """Joins them"""


class _Plan(NamedTuple):
    """One step, but for its tensors."""

    tokens: int
    """T, padding included"""
    out: Callable[[], torch.Tensor]
    """Allocates the result"""
    prefill: _Prefill | None
    decode: _Decode | None


# By the layout of what the kernels read, which is no copy.
_PLANS: PlanCache[_Plan] = PlanCache()
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
    if scale is not None and scale <= 0:
        q, scale = -q, max(-scale, LEAST_SCALE)
    given: Tensors = (q, k, v, k_cache, v_cache)
    if batch.tokens:
        given += (input_pos, slot_idx, seq_len) if batch.prefill_tokens else (input_pos, slot_idx)
    if sinks is not None:
        given += (sinks,)
    key = batch, scale, sliding_window, sinks is None
    plan = _PLANS.get(key, given)
    if plan is None:
        require_one_device(OP, *given)
        shapes, given = _readable(given, batch, sinks)
        plan = _PLANS.get(key, given) or _PLANS.keep(
            key, given, _plan(shapes, batch, given, scale, sliding_window or 0, sinks is not None)
        )
    if read_at_once(q):
        read_spans(OP, batch, plan.tokens, seq_len, input_pos, slot_idx, k_cache.shape)
    out = plan.out()
    if batch.tokens < plan.tokens:
        out.view(plan.tokens, -1)[batch.tokens :].zero_()
    _run(plan, given, given[0] if sinks is None else given[-1], out)
    return out


def _run(plan: _Plan, given: Tensors, sinks: torch.Tensor, out: torch.Tensor) -> None:
    """Launch the step; `sinks` is q where there are none."""
    word = report_word(OP)
    if plan.prefill is not None:
        q, k, v, k_cache, v_cache, input_pos, slot_idx, seq_len = given[:8]
        one = plan.prefill.append
        one.form(one.grid, (k, v, k_cache, v_cache, seq_len, input_pos, slot_idx, word), one.free)
        one = plan.prefill.attend
        one.form(one.grid, (q, k_cache, v_cache, out, seq_len, input_pos, slot_idx, sinks), one.free)
    if plan.decode is not None:
        one, allocate, reduce = plan.decode
        partial = out if allocate is None else allocate()
        one.form(one.grid, (*given[:5], out, partial, *given[5:7], sinks, word), one.free)
        if reduce is not None:
            reduce.form(reduce.grid, (partial, out, *given[5:7], sinks), reduce.free)


def _readable(given: Tensors, batch: Batch, sinks: torch.Tensor | None) -> tuple[_Shapes, Tensors]:
    """Checked tensors that kernels can read: copies of those whose tokens or heads have no common stride, and of
    metadata that is not contiguous."""
    (q, k, v, k_cache, v_cache), rest = given[:5], given[5:]
    shapes = _describe(q, k, v, k_cache, v_cache, sinks)
    if shapes is None:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        shapes = _describe(q, k, v, k_cache, v_cache, sinks)
        assert shapes is not None
    if batch.tokens > shapes.tokens:
        raise ValueError(f"{OP}: batch_info_host counts {batch.tokens} tokens, q holds {shapes.tokens}")
    if batch.tokens:
        counts = (batch.sequences, batch.sequences, batch.prefill)
        for name, tensor, count in zip(("input_pos", "slot_idx", "seq_len"), rest, counts, strict=False):
            _check_entries(name, tensor, count, q.device)
    return shapes, (q, k, v, k_cache, v_cache, *[tensor.contiguous() for tensor in rest])


def _check_entries(name: str, tensor: torch.Tensor | None, count: int, device: torch.device) -> None:
    """`tensor` must have an entry for each of `count` sequences."""
    if tensor is None or tensor.numel() < count or tensor.device != device:
        came = "None" if tensor is None else f"{tensor.numel()} entries on {tensor.device}"
        raise ValueError(f"{OP}: {name} is {came}; legal: an entry for each of the {count} sequences on {device}")


def _describe(q, k, v, k_cache, v_cache, sinks) -> _Shapes | None:
    """None where q, k or v must be made contiguous first."""
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
    found = [_row_strides(x, size) for x, size in ((q, heads.size), (k, heads.size), (v, heads.value_size))]
    rows = tuple(row for row in found if row is not None)
    if len(rows) < len(found):
        return None
    caches = tuple(_strides(cache.stride()[:3], cache.shape[:3]) for cache in (k_cache, v_cache))
    sizes = (heads.size, heads.value_size, tiles.power_of_two(heads.size), tiles.power_of_two(heads.value_size))
    dtypes = (q.dtype, k_cache.dtype, v_cache.dtype, None if sinks is None else sinks.dtype)
    tile = tiles.decode_tile(heads.group, heads.size, heads.value_size, q.element_size())
    same = (dtypes, *rows, caches, heads, tile)
    return _Shapes(heads, q.shape[0] * q.shape[1], rows, caches, sizes, tile, same)


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


def _plan(shapes: _Shapes, batch: Batch, given: Tensors, scale: float | None, window: int, has_sinks: bool) -> _Plan:
    """What the step launches for tensors like `given`."""
    q, _, _, k_cache, v_cache = given[:5]
    return _Plan(
        shapes.tokens,
        allocator(tuple(cached_output_shape(q, k_cache, v_cache)), q.dtype, q.device),
        _plan_prefill(shapes, batch, given, scale, max(window, 0), has_sinks) if batch.prefill_tokens else None,
        _plan_decode(shapes, batch, given, scale, max(window, 0), has_sinks) if batch.decode else None,
    )


def _plan_prefill(shapes: _Shapes, batch: Batch, given: Tensors, scale, window: int, has_sinks: bool) -> _Prefill:
    q, k_cache, (input_pos, slot_idx, seq_len) = given[0], given[3], given[5:8]
    heads, sequences, pdl = shapes.heads, min(256, tiles.power_of_two(batch.prefill)), dependent_launch(q.device)
    key = (shapes.same, seq_len.dtype, input_pos.dtype, slot_idx.dtype, window, sequences)
    append = _form(
        _append, q.device, key,
        (*shapes.rows[1:], *shapes.caches, *shapes.sizes, APPEND_TOKENS, sequences, pdl), warps=4,
    )  # fmt: skip
    rows = batch.prefill_tokens * heads.group
    tile = tiles.prefill_tile(rows // batch.prefill, heads.size, heads.value_size, q.element_size())
    attend = _form(
        _prefill, q.device, (*key, tile),
        (shapes.rows[0], *shapes.caches, heads.keys, heads.group, *shapes.sizes, tile.rows, tile.keys, sequences,
         window, has_sinks, pdl),
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    count = -(-rows // tile.rows) + batch.prefill  # tiles for each KV head; each sequence may end in a part of one
    limits = (batch.prefill_tokens, batch.prefill, *k_cache.shape[:2])
    return _Prefill(
        Launch(append, (-(-batch.prefill_tokens // APPEND_TOKENS), heads.keys, 1), limits),
        Launch(attend, (count * heads.keys, 1, 1), (default_scale(scale, heads.size) * LOG2_E, count, *limits)),
    )


def _plan_decode(shapes: _Shapes, batch: Batch, given: Tensors, scale, window: int, has_sinks: bool) -> _Decode:
    q, k_cache, (input_pos, slot_idx) = given[0], given[3], given[5:7]
    tile, heads, decode, (slots, max_seq) = shapes.decode_tile, shapes.heads, batch.decode, k_cache.shape[:2]
    reach = min(max_seq, window) if window else max_seq
    splits = tiles.choose_splits(decode * heads.keys, multiprocessors(q.device), reach, tile.keys)
    several, block_splits = splits > 1, tiles.power_of_two(splits, 2)
    key = (shapes.same, window, input_pos.dtype, slot_idx.dtype)
    options = (window, has_sinks, dependent_launch(q.device))
    attend = _form(
        _decode, q.device, (*key, several),
        (*shapes.rows, *shapes.caches, heads.keys, heads.group, *shapes.sizes, tile.rows, tile.keys, several,
         *options),
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    rows = decode * heads.queries * splits  # of the splits' results: sequences x heads x splits
    place = (batch.prefill, batch.prefill_tokens, slots, max_seq, rows, splits)
    launch = Launch(
        attend, (decode * heads.keys * splits, 1, 1), (default_scale(scale, heads.size) * LOG2_E, *place)
    )  # fmt: skip
    if not several:
        return _Decode(launch, None, None)
    reduce = _form(
        _reduce, q.device, (*key, block_splits),
        (heads.queries, heads.value_size, tile.keys, shapes.sizes[3], block_splits, *options), warps=4,
    )  # fmt: skip
    allocate = allocator((rows * (heads.value_size + 1),), torch.float32, q.device)
    return _Decode(launch, allocate, Launch(reduce, (decode * heads.queries, 1, 1), place))
