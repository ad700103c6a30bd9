"""Single tokens of several sequences: what the operator gives for each, whatever their slots and lengths."""

import random

import pytest
import torch

from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import LayerShape, Masking, SlotCache
from shardwise.parallel.single_tokens import _neighbours

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 6, 2, 8


def filled(slots: int, length: int) -> SlotCache:
    cache = SlotCache(
        [LayerShape(KV_HEADS, SIZE, SIZE)], slots=slots, max_length=length, dtype=torch.float32, device=CPU
    )
    cache.tokens(0).normal_()
    return cache


def by_itself(cache: SlotCache, q: torch.Tensor, kv: torch.Tensor, span: Span, window: int | None) -> torch.Tensor:
    """float64 [N, Dv]."""
    keys, values = (row[span.slot, : span.total].double().clone() for row in cache.rows(0))
    keys[-1], values[-1] = (part[0] for part in LayerShape(KV_HEADS, SIZE, SIZE).split(kv[None].double()))
    start = max(0, span.total - window) if window else 0
    keys, values = (x[start:].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
    weights = (0.3 * torch.einsum("nd,lnd->nl", q.double(), keys)).softmax(-1)
    return torch.einsum("nl,lnd->nd", weights, values)


@pytest.mark.parametrize("window", [None, 7, 1])
@pytest.mark.parametrize("count", [2, 5, 12])
def test_each_sequence_gets_what_it_gets_by_itself(count, window):
    torch.manual_seed(count)
    chance, cache = random.Random(count), filled(12, 60)
    slots = chance.sample(range(12), count)
    spans = [Span(slot, chance.choice([0, 1, 6, 20, 59]), 1) for slot in slots]
    q, kv = torch.randn(count, HEADS, SIZE), torch.randn(count, KV_HEADS * 2 * SIZE)
    expected = torch.stack([by_itself(cache, *row, span, window) for *row, span in zip(q, kv, spans, strict=True)])
    got = cache.attend(0, q, kv, Batch(spans, [0] * count, CPU), Masking(scale=0.3, window=window))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(cache.tokens(0)[span.slot, span.past], new) for span, new in zip(spans, kv, strict=True))


def test_one_long_sequence_does_not_pad_many_short_ones():
    short, long = [Span(slot, 10, 1) for slot in range(6)], Span(6, 8000, 1)
    assert [len(run) for run in _neighbours([*short, long])] == [6, 1]
    assert [[span.slot for span in run] for run in _neighbours([Span(s, 9, 1) for s in (0, 1, 3, 4, 5)])] == [
        [0, 1],
        [3, 4, 5],
    ]


def test_a_sequence_that_overflowed_leaves_nothing_to_those_after_it():
    cache = filled(2, 32)
    assert cache.reserve(0, 20)
    cache.tokens(0)[0, :20] = torch.nan
    cache.release(0)
    spans = [Span(0, 3, 1), Span(1, 6, 1)]
    q, kv = torch.randn(2, HEADS, SIZE), torch.randn(2, KV_HEADS * 2 * SIZE)
    assert cache.attend(0, q, kv, Batch(spans, [0, 0], CPU), Masking(scale=0.3)).isfinite().all()
