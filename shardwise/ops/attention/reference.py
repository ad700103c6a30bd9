"""Attention in plain PyTorch, on CPU and CUDA: the reference for the other backends.

out = softmax(mask(cap(q k^T * scale))) v, one KV head serving N / Nkv query heads. Queries are the last Sq
positions of the Sk keys, so causal masks and windows align at the bottom right. A query that sees no key gives 0.
"""

import torch

from shardwise.ops.attention.batch import read_batch, read_spans
from shardwise.ops.attention.cached import append_and_attend
from shardwise.ops.attention.checks import (
    Heads,
    cached_output_shape,
    check_cached,
    check_mask,
    check_sinks,
    default_scale,
    fake_cached,
    shape,
)
from shardwise.ops.attention.scores import causally_hidden, compute_dtype, soft_cap, softmax_with_sinks
from shardwise.ops.dtypes import check_float
from shardwise.ops.registry import operator


def _fake_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    sinks=None,
    sliding_window=None,
    logit_cap=None,
    layout="bnsd",
):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@operator(fake=_fake_attention)
def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    layout: str = "bnsd",
) -> torch.Tensor:
    """Grouped-query attention.

    query [B, N, Sq, D], key [B, Nkv, Sk, D], value [B, Nkv, Sk, Dv] in layout "bnsd"; dimensions 1 and 2 swapped in
    "bsnd". attn_mask broadcasts to [B, N, Sq, Sk] in both: a boolean mask keeps True, any other is added to the
    scores. scale defaults to D^-0.5; sinks hold one logit a query head; sliding_window W > 0 keeps the last W
    positions; logit_cap > 0 caps the scores before they are masked. dropout_p is ignored: this is inference.
    Returns a contiguous tensor like query with Dv in place of D. Scores and softmax are float32 or wider.
    """
    heads = _check_attention(query, key, value, sinks, layout)
    if layout == "bsnd":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    check_mask("torch_attention", attn_mask, (batch, heads.queries, queries, keys))
    wide = compute_dtype(query.dtype)
    query_rows = (batch, heads.keys, heads.group * queries)
    folded = (query.to(wide) * default_scale(scale, heads.size)).reshape(*query_rows, heads.size)
    scores = soft_cap(folded @ key.to(wide).transpose(-1, -2), logit_cap).view(batch, heads.queries, queries, keys)
    scores = _masked(scores, attn_mask, is_causal, sliding_window)
    weights = softmax_with_sinks(scores, None if sinks is None else sinks.to(wide).reshape(1, -1, 1, 1))
    if keys and (attn_mask is not None or queries > keys):
        weights = weights.masked_fill(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)
    out = (weights.view(*query_rows, keys) @ value.to(wide)).view(batch, heads.queries, queries, heads.value_size)
    return (out.transpose(1, 2) if layout == "bsnd" else out).to(query.dtype).contiguous()


def _check_attention(query, key, value, sinks, layout) -> Heads:
    op = "torch_attention"
    if layout not in ("bnsd", "bsnd"):
        raise ValueError(f"{op}: layout is {layout!r}; legal: 'bnsd', 'bsnd'")
    check_float(op, "query", query)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"{op}: query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; legal: one dtype")
    fits = query.dim() == key.dim() == value.dim() == 4 and key.shape[:3] == value.shape[:3]
    if not fits or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{op}: query {shape(query)}, key {shape(key)}, value {shape(value)} do not fit; legal for bnsd: "
            "[B, N, Sq, D], [B, Nkv, Sk, D], [B, Nkv, Sk, Dv]; for bsnd with dimensions 1 and 2 swapped"
        )
    dim = 1 if layout == "bnsd" else 2
    heads = Heads(query.shape[dim], key.shape[dim], query.shape[-1], value.shape[-1])
    if heads.keys == 0 or heads.queries % heads.keys:
        raise ValueError(f"{op}: {heads.queries} query heads over {heads.keys} KV heads; legal: a multiple")
    check_sinks(op, sinks, heads.queries)
    return heads


def _masked(scores: torch.Tensor, attn_mask, is_causal: bool, window: int | None) -> torch.Tensor:
    queries, keys = scores.shape[-2:]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    if not is_causal and (window is None or window <= 0):
        return scores
    last = torch.arange(keys - queries, keys, device=scores.device)
    hidden = causally_hidden(last, torch.arange(keys, device=scores.device), window)
    return scores.masked_fill(hidden, float("-inf"))


def _fake_sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@operator(fake=_fake_sdpa)
def torch_attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of [B, N, S, D] tensors, with a contiguous result.

    Its conventions hold: a causal mask aligns at the top left, dropout_p is applied.
    """
    _check_sdpa(query, key, value, attn_mask, is_causal, enable_gqa)
    if query.numel() == 0:
        return _fake_sdpa(query, key, value)  # on a GPU the function itself gives None
    query, key, value = (_aligned(tensor.contiguous()) for tensor in (query, key, value))
    mask = None if attn_mask is None else _aligned(attn_mask)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    ).contiguous()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """On a GPU at a multiple of 16 bytes, which the kernels of PyTorch's function take for granted."""
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


def _check_sdpa(query, key, value, attn_mask, is_causal, enable_gqa) -> None:
    op = "torch_attention_sdpa"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {shape(tensor)}; legal: [B, N, S, D]")
        check_float(op, name, tensor)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, query is {query.dtype}; legal: one dtype")
    heads, kv_heads = query.shape[1], key.shape[1]
    fits = key.shape[:3] == value.shape[:3] and key.shape[0] in (1, query.shape[0]) and key.shape[3] == query.shape[3]
    if not fits:
        raise ValueError(f"{op}: query {shape(query)}, key {shape(key)}, value {shape(value)} do not fit; legal: "
                         "[B, N, Sq, D], [B, Nkv, Sk, D], [B, Nkv, Sk, Dv]")  # fmt: skip
    if kv_heads not in (1, heads) and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        raise ValueError(f"{op}: {heads} query heads, {kv_heads} KV heads; legal: equal numbers, one KV head, or "
                         "enable_gqa=True with a multiple")  # fmt: skip
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(f"{op}: attn_mask and is_causal are both given; legal: one of them")
    check_mask(op, attn_mask, (*query.shape[:3], key.shape[2]))
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"{op}: attn_mask is {attn_mask.dtype}; legal: bool, float32, or query's {query.dtype}")


def _fake_repeat_kv(hidden_states, n_rep):
    batch, heads, sequence, size = hidden_states.shape
    return hidden_states.new_empty(batch, heads * n_rep, sequence, size)


@operator(fake=_fake_repeat_kv)
def torch_attention_repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each KV head n_rep times in place: [B, Nkv, S, D] -> [B, Nkv * n_rep, S, D], never an alias."""
    if hidden_states.dim() != 4:
        raise ValueError(
            f"torch_attention_repeat_kv: hidden_states has shape {shape(hidden_states)}; legal: [B, Nkv, S, D]"
        )
    if n_rep < 1:
        raise ValueError(f"torch_attention_repeat_kv: n_rep is {n_rep}; legal: 1 and more")
    batch, heads, sequence, size = hidden_states.shape
    repeated = hidden_states[:, :, None].expand(batch, heads, n_rep, sequence, size)
    return repeated.clone(memory_format=torch.contiguous_format).view(batch, heads * n_rep, sequence, size)


def _fake_cached(
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
    sliding_window_size=None,
    logit_cap=None,
):
    return fake_cached(q, k_cache, v_cache)


@operator(fake=_fake_cached, mutates=("k_cache", "v_cache"))
def torch_cached_attention_with_cache(
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
    sliding_window_size: int | None = None,
    logit_cap: float | None = None,
) -> torch.Tensor:
    """Append k and v to an unpaged cache and attend to it, causally.

    q [b, s, N, D] or [b, s, N*D], k [b, s, Nkv, D], v [b, s, Nkv, Dv] (or flattened likewise) are the step's flat
    tokens: prefill sequences (`seq_len` tokens each), decode sequences (one token each), then padding, whose
    output is 0. k_cache [slots, max_seq, Nkv, D] and v_cache [.., Dv] are written at [slot_idx, input_pos ..]; they
    may have another dtype (fp8). A sequence whose slot is -1 is padding. Other options as in `torch_attention`.
    `cu_seqlen` is not read: sequences are concatenated. Returns q's shape with Dv in place of D.
    """
    op = "torch_cached_attention_with_cache"
    heads = check_cached(op, q, k, v, k_cache, v_cache, sinks)
    tokens = q.shape[0] * q.shape[1]
    spans = read_spans(op, read_batch(op, batch_info_host), tokens, seq_len, input_pos, slot_idx, k_cache.shape)
    wide = compute_dtype(q.dtype)
    queries = (q.to(wide) * default_scale(scale, heads.size)).reshape(tokens, heads.keys, heads.group, heads.size)
    k, v = k.reshape(tokens, heads.keys, heads.size), v.reshape(tokens, heads.keys, heads.value_size)
    if sinks is not None:
        sinks = sinks.to(wide).reshape(heads.keys, heads.group, 1)
    pieces, end = [], 0
    for span in spans:
        end = span.start + span.length
        if span.slot < 0 or span.length == 0:
            pieces.append(queries.new_zeros(span.length, heads.queries, heads.value_size))
            continue
        k_row, v_row = k_cache.select(0, span.slot), v_cache.select(0, span.slot)
        pieces += append_and_attend(span, queries, k, v, k_row, v_row, sinks, sliding_window_size, logit_cap)
    if end < tokens or not pieces:
        pieces.append(queries.new_zeros(tokens - end, heads.queries, heads.value_size))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out.to(q.dtype).contiguous().view(cached_output_shape(q, k_cache, v_cache))
