"""Multi-head latent attention in plain PyTorch, on CPU and CUDA: the reference for the other backends.

Keys and values of all heads are a linear map of one latent vector a token, [K_nope | V] = latent W^T; a rotated key
part is shared by the heads. With W split into W_k and W_v, q_nope . (W_k latent) = (W_k^T q_nope) . latent: decode
absorbs W_k into the query and W_v into the output and reads only the latent cache.
"""

import torch

from shardwise.ops.attention.batch import Span, read_batch, read_spans
from shardwise.ops.attention.checks import shape
from shardwise.ops.attention.scores import causally_hidden, compute_dtype
from shardwise.ops.dtypes import check_cache
from shardwise.ops.mla.checks import LatentHeads, check_latent, split_weight
from shardwise.ops.registry import operator

# Queries scored at once against a cache: bounds the score matrix of a long prefill.
QUERY_CHUNK = 256


def _fake_mla(q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight, is_causal=True, scale=None, layout="bsnd"):
    heads = q_nope.shape[2 if layout == "bsnd" else 1]
    return q_nope.new_empty(*q_nope.shape[:3], kv_b_proj_weight.shape[0] // heads - q_nope.shape[3])


@operator(fake=_fake_mla)
def torch_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    compressed_kv: torch.Tensor,
    kpe: torch.Tensor,
    kv_b_proj_weight: torch.Tensor,
    is_causal: bool = True,
    scale: float | None = None,
    layout: str = "bsnd",
) -> torch.Tensor:
    """Latent attention without a cache.

    q_nope [B, Sq, N, Dn], q_pe [B, Sq, N, Dr] and kpe [B, Sk, 1, Dr] with rotations applied (dimensions 1 and 2 swapped
    in layout "bnsd"), compressed_kv [B, Sk, R] in both layouts, kv_b_proj_weight [N * (Dn + Dv), R], a head's rows
    being Dn of its key, then Dv of its value. Causal queries are the last Sq positions. scale defaults to
    (Dn + Dr)^-0.5. Returns q_nope's shape with Dv in place of Dn, contiguous. Source: DeepSeek-V2, section 2.1.
    """
    op = "torch_mla"
    if layout not in ("bnsd", "bsnd"):
        raise ValueError(f"{op}: layout is {layout!r}; legal: 'bnsd', 'bsnd'")
    heads = check_latent(op, q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight, 2 if layout == "bsnd" else 1)
    query = torch.cat((q_nope, q_pe), dim=-1)
    if layout == "bsnd":
        query, kpe = query.transpose(1, 2), kpe.transpose(1, 2)
    queries, keys = query.shape[2], compressed_kv.shape[1]
    wide = compute_dtype(q_nope.dtype)
    key, value = _expand(compressed_kv.to(wide), kpe[:, 0].to(wide), kv_b_proj_weight.to(wide), heads)
    scores = (query.to(wide) * heads.scale(scale)) @ key.transpose(-1, -2)
    if is_causal:
        positions = torch.arange(keys, device=scores.device)
        last = torch.arange(keys - queries, keys, device=scores.device)
        scores = scores.masked_fill(causally_hidden(last, positions, None), float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if is_causal and queries > keys:  # the first queries see no key
        weights = weights.nan_to_num(0.0)
    out = weights @ value
    return (out.transpose(1, 2) if layout == "bsnd" else out).to(q_nope.dtype).contiguous()


def _expand(latent, kpe, weight, heads: LatentHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """latent [..., L, R], kpe [..., L, Dr] -> keys [..., N, L, Dn + Dr], values [..., N, L, Dv]."""
    both = (latent @ weight.t()).unflatten(-1, (heads.count, heads.nope + heads.value)).transpose(-2, -3)
    shared = kpe.unsqueeze(-3).expand(*both.shape[:-1], heads.rope)
    return torch.cat((both[..., : heads.nope], shared), dim=-1), both[..., heads.nope :]


def _fake_cached(
    q_nope,
    q_pe,
    compressed_kv,
    kpe,
    kv_b_proj_weight,
    batch_info_host,
    seq_len,
    input_pos,
    slot_idx,
    cu_seqlen,
    mla_cache,
    scale=None,
    kv_lora_rank=512,
):
    return fake_cached_mla(q_nope, kv_b_proj_weight)


def fake_cached_mla(q_nope: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An empty result [b, s, N, Dv] of the cached MLA operators."""
    return q_nope.new_empty(*q_nope.shape[:3], weight.shape[0] // q_nope.shape[2] - q_nope.shape[3])


@operator(fake=_fake_cached, mutates=("mla_cache",))
def torch_cached_mla_with_cache(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    compressed_kv: torch.Tensor,
    kpe: torch.Tensor,
    kv_b_proj_weight: torch.Tensor,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    slot_idx: torch.Tensor,
    cu_seqlen: torch.Tensor,
    mla_cache: torch.Tensor,
    scale: float | None = None,
    kv_lora_rank: int = 512,
) -> torch.Tensor:
    """Append latents to an unpaged cache and attend to it, causally.

    q_nope [b, s, N, Dn], q_pe [b, s, N, Dr], compressed_kv [b, s, R], kpe [b, s, 1, Dr] are the step's flat tokens:
    prefill sequences (`seq_len` tokens each), decode sequences (one token each), then padding, whose output is 0.
    mla_cache [slots, max_seq, R + Dr] holds latent and rotated key, written at [slot_idx, input_pos ..]. A sequence
    whose slot is -1 is padding. `cu_seqlen` is not read: sequences are concatenated. Returns [b, s, N, Dv].
    """
    op = "torch_cached_mla_with_cache"
    heads = check_latent(op, q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight)
    if heads.rank != kv_lora_rank or mla_cache.dim() != 3 or mla_cache.shape[2] != heads.rank + heads.rope:
        raise ValueError(f"{op}: compressed_kv {shape(compressed_kv)}, kv_lora_rank {kv_lora_rank}, mla_cache "
                         f"{shape(mla_cache)}; legal: R = kv_lora_rank and [slots, max_seq, R + Dr]")  # fmt: skip
    tokens = q_nope.shape[0] * q_nope.shape[1]
    check_cache(op, "mla_cache", mla_cache)
    spans = read_spans(op, read_batch(op, batch_info_host), tokens, seq_len, input_pos, slot_idx, mla_cache.shape)
    wide = compute_dtype(q_nope.dtype)
    query = torch.cat((q_nope, q_pe), dim=-1).flatten(0, 1).to(wide) * heads.scale(scale)
    new = torch.cat((compressed_kv, kpe.squeeze(2)), dim=-1).flatten(0, 1)
    weight = kv_b_proj_weight.to(wide)
    out = query.new_zeros(tokens, heads.count, heads.value)
    for span in spans:
        if span.slot < 0 or span.length == 0:
            continue
        part = slice(span.start, span.start + span.length)
        mla_cache[span.slot, span.past : span.total].copy_(new[part])
        rows = mla_cache[span.slot, : span.total].to(wide)
        if span.length == 1:
            out[part] = _attend_absorbed(query[part], rows, weight, heads)
        else:
            out[part] = _attend_expanded(query[part], rows, weight, span, heads)
    return out.to(q_nope.dtype).view(*q_nope.shape[:3], heads.value)


def _attend_absorbed(query, rows, weight, heads: LatentHeads) -> torch.Tensor:
    """One query [1, N, Dn + Dr] over cache rows [L, R + Dr], the weight absorbed into it -> [1, N, Dv]."""
    w_key, w_value = split_weight(weight, heads)
    nope, rope = query[0].split((heads.nope, heads.rope), dim=-1)
    latent = torch.bmm(nope.unsqueeze(1), w_key).squeeze(1)
    weights = torch.softmax(torch.cat((latent, rope), dim=-1) @ rows.t(), dim=-1)
    mixed = weights @ rows[:, : heads.rank]
    return torch.bmm(w_value, mixed.unsqueeze(2)).view(1, heads.count, heads.value)


def _attend_expanded(query, rows, weight, span: Span, heads: LatentHeads) -> torch.Tensor:
    """Queries [S, N, Dn + Dr], the last S positions of the cache rows [L, R + Dr] -> [S, N, Dv]."""
    key, value = _expand(rows[:, : heads.rank], rows[:, heads.rank :], weight, heads)
    positions = torch.arange(span.total, device=rows.device)
    chunks = []
    for first in range(0, span.length, QUERY_CHUNK):
        chunk = query[first : first + QUERY_CHUNK].transpose(0, 1)
        at = positions[span.past + first : span.past + first + chunk.shape[1]]
        seen = span.past + first + chunk.shape[1]
        scores = chunk @ key[:, :seen].transpose(-1, -2)
        scores.masked_fill_(causally_hidden(at, positions[:seen], None), float("-inf"))
        chunks.append((torch.softmax(scores, dim=-1) @ value[:, :seen]).transpose(0, 1))
    return torch.cat(chunks)
