"""Attention and MLA written out in float64, one query at a time, without batching: what the operators must equal."""

import math
import random
from dataclasses import dataclass, field

import torch


def attend_one(query, keys, values, visible, *, scale, sink=None, cap=None):
    """One query [D] over keys [L, D], values [L, Dv]; `visible` is a list of L flags. float64 [Dv]."""
    scores = [float(query @ keys[j]) * scale if visible[j] else None for j in range(len(keys))]
    if cap:
        scores = [None if s is None else cap * math.tanh(s / cap) for s in scores]
    return _weigh(scores, values, sink)


def _weigh(scores, values, sink):
    logits = [s for s in scores if s is not None] + ([] if sink is None else [float(sink)])
    out = torch.zeros(values.shape[-1], dtype=torch.float64)
    if not logits:
        return out
    highest = max(logits)
    total = sum(math.exp(s - highest) for s in logits)
    for score, value in zip(scores, values, strict=True):
        if score is not None:
            out += math.exp(score - highest) / total * value
    return out


def attention(q, k, v, *, mask=None, causal=False, scale=None, sinks=None, window=None, cap=None):
    """q [B, N, Sq, D], k [B, Nkv, Sk, D], v [B, Nkv, Sk, Dv], mask bool or additive [B, N, Sq, Sk]. float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, size = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scale = size**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                at = keys - queries + i
                seen = [_visible(at - j, causal, window) for j in range(keys)]
                scores = [float(q[b, h, i] @ k[b, h // group, j]) * scale if seen[j] else None for j in range(keys)]
                if cap:
                    scores = [None if s is None else cap * math.tanh(s / cap) for s in scores]
                if mask is not None:
                    scores = [_apply_mask(s, mask[b, h, i, j]) for j, s in enumerate(scores)]
                out[b, h, i] = _weigh(scores, v[b, h // group], None if sinks is None else sinks.reshape(-1)[h])
    return out


def _visible(distance, causal, window):
    if window and window > 0:
        return 0 <= distance < window
    return distance >= 0 or not causal


def _apply_mask(score, entry):
    if entry.dtype == torch.bool:
        return score if bool(entry) else None
    return None if score is None or float(entry) == -math.inf else score + float(entry)


@dataclass
class Step:
    """One step over an unpaged cache: `lengths` new tokens for each sequence, `past` cached ones, `slots` its rows.

    The last `decode` sequences are decode sequences; `padding` tokens follow at the end.
    """

    lengths: list[int]
    past: list[int]
    slots: list[int]
    decode: int = 0
    padding: int = 0
    starts: list[int] = field(init=False)

    def __post_init__(self):
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]

    @property
    def tokens(self):
        return self.starts[-1] + self.padding

    @property
    def prefill(self):
        return len(self.lengths) - self.decode

    def metadata(self, device="cpu"):
        """batch_info_host, seq_len, input_pos, slot_idx, cu_seqlen in the operators' order."""
        info = torch.tensor([self.prefill, self.starts[self.prefill], self.decode], dtype=torch.int32)
        ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (self.lengths, self.past)]
        slots = torch.tensor(self.slots, dtype=torch.int64, device=device)
        return info, *ints, slots, torch.tensor(self.starts, dtype=torch.int32, device=device)


def random_step(seed: int, slots: int = 4, max_seq: int = 12) -> Step:
    """Any mix of prefill, continued, empty and decode sequences with distinct or padding slots."""
    rng = random.Random(seed)
    count = rng.randint(1, slots)
    decode = rng.randint(0, count)
    lengths = [rng.choice((0, 1, 2, rng.randint(1, max_seq))) for _ in range(count - decode)] + [1] * decode
    past = [rng.randint(0, max_seq - length) for length in lengths]
    places = [slot if rng.random() < 0.85 else -1 for slot in rng.sample(range(slots), count)]
    return Step(lengths, past, places, decode=decode, padding=rng.choice((0, 0, 2)))


def cached_attention(step, q, k, v, k_cache, v_cache, *, scale=None, sinks=None, window=None, cap=None):
    """q [T, N, D], k [T, Nkv, D], v [T, Nkv, Dv] -> (out float64 [T, N, Dv], k_cache, v_cache after the step)."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(step.tokens, q.shape[1], v.shape[-1], dtype=torch.float64)
    for start, length, past, slot in zip(step.starts, step.lengths, step.past, step.slots, strict=False):
        if slot < 0:
            continue
        for t in range(length):
            k_cache[slot, past + t] = k[start + t].to(k_cache.dtype)
            v_cache[slot, past + t] = v[start + t].to(v_cache.dtype)
        for t in range(length):
            seen = [_visible(past + t - j, True, window) for j in range(past + t + 1)]
            for h in range(q.shape[1]):
                keys, values = k_cache[slot, : len(seen), h // group], v_cache[slot, : len(seen), h // group]
                out[start + t, h] = attend_one(
                    q[start + t, h].double(), keys.double(), values.double(), seen,
                    scale=scale, cap=cap, sink=None if sinks is None else sinks.reshape(-1)[h],
                )  # fmt: skip
    return out, k_cache, v_cache


def expand_latent(latent, kpe, weight, heads, nope):
    """latent [L, R], kpe [L, Dr], weight [N*(Dn+Dv), R] -> keys [L, N, Dn+Dr], values [L, N, Dv] in float64."""
    both = (latent.double() @ weight.double().T).view(len(latent), heads, -1)
    rope = kpe.double()[:, None].expand(-1, heads, -1)
    return torch.cat((both[..., :nope], rope), dim=-1), both[..., nope:]


def cached_mla(step, q_nope, q_pe, latent, kpe, weight, cache, *, scale=None):
    """q_nope [T, N, Dn], q_pe [T, N, Dr], latent [T, R], kpe [T, Dr], cache [slots, max_seq, R+Dr]."""
    cache = cache.clone()
    heads, nope = q_nope.shape[1:]
    rank = latent.shape[-1]
    query = torch.cat((q_nope, q_pe), dim=-1).double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(step.tokens, heads, weight.shape[0] // heads - nope, dtype=torch.float64)
    for start, length, past, slot in zip(step.starts, step.lengths, step.past, step.slots, strict=False):
        if slot < 0 or length == 0:
            continue
        new = torch.cat((latent[start : start + length], kpe[start : start + length]), dim=-1)
        cache[slot, past : past + length] = new.to(cache.dtype)
        rows = cache[slot, : past + length].double()
        keys, values = expand_latent(rows[:, :rank], rows[:, rank:], weight, heads, nope)
        for t in range(length):
            for h in range(heads):
                seen = [True] * (past + t + 1)
                out[start + t, h] = attend_one(
                    query[start + t, h], keys[: len(seen), h], values[: len(seen), h], seen, scale=scale
                )
    return out, cache
