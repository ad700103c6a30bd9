"""Attention over an unpaged cache by our own Triton kernels: flash-decoding and a variable-length prefill.

Nothing waits for the device and no launch depends on device data, so a decode step can be captured in a CUDA graph.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from shardwise.ops.attention import tiles
from shardwise.ops.attention.batch import Batch, read_batch, read_spans
from shardwise.ops.attention.checks import cached_output_shape, default_scale, fake_cached
from shardwise.ops.attention.kernels.append import append_kernel
from shardwise.ops.attention.kernels.decode import flattened_decode_kernel, reduce_kernel
from shardwise.ops.attention.kernels.prefill import prefill_kernel
from shardwise.ops.attention.layout import Shapes, readable
from shardwise.ops.devices import require_one_device
from shardwise.ops.kernel_launch import Form, Kernel, Launch
from shardwise.ops.metadata_reports import raise_report, read_at_once, report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import dependent_launch, multiprocessors
from shardwise.plan_cache import PlanCache, Tensors, allocator

OP = "triton_attention_flattened_mha_with_cache"
LOG2_E = math.log2(math.e)
APPEND_TOKENS = 16
LEAST_SCALE = 1e-30  # for 0: the kernels order scores before they scale them, and hide keys by scores of -inf

_append, _prefill, _decode, _reduce = (
    Kernel(kernel) for kernel in (append_kernel, prefill_kernel, flattened_decode_kernel, reduce_kernel)
)


class _Scores(NamedTuple):
    """What scores go through, in units of log2."""

    scale: float
    cap: float
    """They become cap tanh(score / cap); 0: they do not"""
    window: int
    """Positions that a query sees, its own included; 0: all before it"""
    has_sinks: bool


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
    """`attend_to_cache` without a logit cap; `cu_seqlen` is not read."""
    return attend_to_cache(
        q, k, v, batch_info_host, seq_len, input_pos, slot_idx, k_cache, v_cache, scale, sinks, sliding_window
    )


def attend_to_cache(
    q: torch.Tensor,  # [b, s, N, D] or [b, s, N * D]
    k: torch.Tensor,  # [b, s, Nkv, D] or flat
    v: torch.Tensor,  # [b, s, Nkv, Dv] or flat
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    slot_idx: torch.Tensor,
    k_cache: torch.Tensor,  # [slots, max_seq, Nkv, D]
    v_cache: torch.Tensor,  # [slots, max_seq, Nkv, Dv]
    scale: float | None,
    sinks: torch.Tensor | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
) -> torch.Tensor:
    """Append k and v to an unpaged cache and attend to it, causally.

    Tensors and meaning are those of `torch_cached_attention_with_cache`. float16, bfloat16 or float32; the caches may
    be float8_e4m3fn. Lengths, positions and slots stay on the device: a sequence that would leave the cache is not
    read and gives 0, like slot -1, and the next call raises ValueError for it (`metadata_reports.py`).
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
    key = batch, scale, sliding_window, logit_cap, sinks is None
    plan = _PLANS.get(key, given)
    if plan is None:
        require_one_device(OP, *given)
        shapes, given = readable(OP, given, batch, sinks)
        scores = _Scores(
            default_scale(scale, shapes.heads.size) * LOG2_E,
            max(logit_cap or 0.0, 0.0) * LOG2_E,
            max(sliding_window or 0, 0),
            sinks is not None,
        )
        plan = _PLANS.get(key, given) or _PLANS.keep(key, given, _plan(shapes, batch, given, scores))
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


def _plan(shapes: Shapes, batch: Batch, given: Tensors, scores: _Scores) -> _Plan:
    """What the step launches for tensors like `given`."""
    q, _, _, k_cache, v_cache = given[:5]
    return _Plan(
        shapes.tokens,
        allocator(tuple(cached_output_shape(q, k_cache, v_cache)), q.dtype, q.device),
        _plan_prefill(shapes, batch, given, scores) if batch.prefill_tokens else None,
        _plan_decode(shapes, batch, given, scores) if batch.decode else None,
    )


def _plan_prefill(shapes: Shapes, batch: Batch, given: Tensors, scores: _Scores) -> _Prefill:
    q, k_cache, (input_pos, slot_idx, seq_len) = given[0], given[3], given[5:8]
    heads, sequences, pdl = shapes.heads, min(256, tiles.power_of_two(batch.prefill)), dependent_launch(q.device)
    key = (shapes.same, seq_len.dtype, input_pos.dtype, slot_idx.dtype, *scores[1:], sequences)
    append = _form(
        _append, q.device, key,
        (*shapes.rows[1:], *shapes.caches, *shapes.sizes, APPEND_TOKENS, sequences, pdl), warps=4,
    )  # fmt: skip
    rows = batch.prefill_tokens * heads.group
    tile = tiles.prefill_tile(rows // batch.prefill, heads.size, heads.value_size, q.element_size())
    attend = _form(
        _prefill, q.device, (*key, tile),
        (shapes.rows[0], *shapes.caches, heads.keys, heads.group, *shapes.sizes, tile.rows, tile.keys, sequences,
         *scores[1:], pdl),
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    count = -(-rows // tile.rows) + batch.prefill  # tiles for each KV head; each sequence may end in a part of one
    limits = (batch.prefill_tokens, batch.prefill, *k_cache.shape[:2])
    return _Prefill(
        Launch(append, (-(-batch.prefill_tokens // APPEND_TOKENS), heads.keys, 1), limits),
        Launch(attend, (count * heads.keys, 1, 1), (scores.scale, count, *limits)),
    )


def _plan_decode(shapes: Shapes, batch: Batch, given: Tensors, scores: _Scores) -> _Decode:
    q, k_cache, (input_pos, slot_idx) = given[0], given[3], given[5:7]
    tile, heads, decode, (slots, max_seq) = shapes.decode_tile, shapes.heads, batch.decode, k_cache.shape[:2]
    reach = min(max_seq, scores.window) if scores.window else max_seq
    splits = tiles.choose_splits(decode * heads.keys, multiprocessors(q.device), reach, tile.keys)
    several, block_splits = splits > 1, tiles.power_of_two(splits, 2)
    key = (shapes.same, *scores[1:], input_pos.dtype, slot_idx.dtype)
    pdl = dependent_launch(q.device)
    attend = _form(
        _decode, q.device, (*key, several),
        (*shapes.rows, *shapes.caches, heads.keys, heads.group, *shapes.sizes, tile.rows, tile.keys, several,
         *scores[1:], pdl),
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    rows = decode * heads.queries * splits  # of the splits' results: sequences x heads x splits
    place = (batch.prefill, batch.prefill_tokens, slots, max_seq, rows, splits)
    launch = Launch(attend, (decode * heads.keys * splits, 1, 1), (scores.scale, *place))
    if not several:
        return _Decode(launch, None, None)
    reduce = _form(
        _reduce, q.device, (*key, block_splits),
        (heads.queries, heads.value_size, tile.keys, shapes.sizes[3], block_splits, scores.window, scores.has_sinks,
         pdl),
        warps=4,
    )  # fmt: skip
    allocate = allocator((rows * (heads.value_size + 1),), torch.float32, q.device)
    return _Decode(launch, allocate, Launch(reduce, (decode * heads.queries, 1, 1), place))
