"""Plain PyTorch attention of one sequence over its row of an unpaged cache: the maths of the cached reference."""

import torch

from shardwise.ops.attention.batch import Span
from shardwise.ops.attention.scores import causally_hidden, soft_cap, softmax_with_sinks

# Queries scored at once against a cache: bounds the score matrix of a long prefill and skips the keys that a
# chunk cannot see. On one CPU core 64 was the fastest of 64 to 512, for prompts of 512 and 2000 tokens; on a GPU,
# where each chunk costs a dozen launches, eight times as many.
QUERY_CHUNK = 64


def append_and_attend(
    span: Span,
    queries: torch.Tensor,  # [T, Nkv, group, D], scaled, float32 or wider
    k: torch.Tensor,  # [T, Nkv, D]
    v: torch.Tensor,  # [T, Nkv, Dv]
    k_row: torch.Tensor,  # [max_seq, Nkv, D], the sequence's row of the cache
    v_row: torch.Tensor,
    sinks: torch.Tensor | None,  # [Nkv, group, 1]
    window: int | None,
    cap: float | None,
) -> list[torch.Tensor]:
    """Write the sequence's new keys and values, and return its outputs in pieces [n, N, Dv]."""
    k_row.narrow(0, span.past, span.length).copy_(k.narrow(0, span.start, span.length))
    v_row.narrow(0, span.past, span.length).copy_(v.narrow(0, span.start, span.length))
    reach = window if window is not None and window > 0 else span.total
    plain = reach >= span.total and sinks is None and (cap is None or cap <= 0)
    if plain and span.past == 0 and span.length > 1 and queries.device.type == "cpu":
        return [_attend_prompt(queries.narrow(0, span.start, span.length), k_row, v_row)]
    most = QUERY_CHUNK if queries.device.type == "cpu" else 8 * QUERY_CHUNK
    pieces = []
    for first in range(span.past, span.total, most):
        count = min(most, span.total - first)
        lowest = max(0, first - reach + 1)
        chunk = queries.narrow(0, span.start + first - span.past, count)
        keys, values = (row.narrow(0, lowest, first + count - lowest).to(chunk.dtype) for row in (k_row, v_row))
        if count == 1:
            pieces.append(_attend_one(chunk, keys, values, sinks, cap))
        else:
            pieces.append(_attend_chunk(chunk, keys, values, first - lowest, sinks, window, cap))
    return pieces


def _attend_prompt(queries, k_row, v_row) -> torch.Tensor:
    """A whole prompt, queries [S, Nkv, group, D] over the first S keys: PyTorch's fused kernel, twice as fast."""
    count, kv_heads, group, _ = queries.shape
    keys, values = (
        row[:count].to(queries.dtype).transpose(0, 1)[:, None].expand(kv_heads, group, count, row.shape[-1])
        for row in (k_row, v_row)
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        queries.permute(1, 2, 0, 3), keys, values, is_causal=True, scale=1.0
    )
    return out.permute(2, 0, 1, 3).reshape(count, kv_heads * group, -1)


def _attend_one(query, keys, values, sinks, cap) -> torch.Tensor:
    """query [1, Nkv, group, D] over keys [L, Nkv, D] that it all sees, values [L, Nkv, Dv] -> [1, N, Dv].

    The group's heads are the rows of one product for each KV head, so nothing is repeated or copied.
    """
    scores = soft_cap(torch.bmm(query[0], keys.permute(1, 2, 0)), cap)
    out = torch.bmm(softmax_with_sinks(scores, sinks), values.transpose(0, 1))
    return out.view(1, -1, values.shape[-1])


def _attend_chunk(queries, keys, values, first: int, sinks, window, cap) -> torch.Tensor:
    """queries [S, Nkv, group, D] at positions first .. of keys [L, Nkv, D], values [L, Nkv, Dv] -> [S, N, Dv]."""
    count, kv_heads, group, size = queries.shape
    total = keys.shape[0]
    folded = queries.permute(1, 2, 0, 3).reshape(kv_heads, group * count, size)
    scores = soft_cap(torch.bmm(folded, keys.permute(1, 2, 0)), cap).view(kv_heads, group, count, total)
    positions = torch.arange(total, device=scores.device)
    scores.masked_fill_(causally_hidden(positions[first:], positions, window), float("-inf"))
    weights = softmax_with_sinks(scores, None if sinks is None else sinks[..., None])
    out = torch.bmm(weights.view(kv_heads, group * count, total), values.transpose(0, 1))
    return out.view(kv_heads, group, count, -1).permute(2, 0, 1, 3).reshape(count, kv_heads * group, -1)
