"""The paged cache of a GPU attends as rows do: prompts, chunks of prompts and single tokens, over page borders."""

import pytest
import torch

from shardwise.ops.triton_support import interpreting
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import LatentWeights, LayerShape, Masking, SlotCache
from shardwise.parallel.device_cache import PAGE_SIZE, DeviceCache
from shardwise.parallel.prefill import Choice, choose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)
HEADS, LENGTH = 4, 4 * PAGE_SIZE
STEPS = [
    [(2, 0, 70), (0, 0, 5)],  # prompts
    [(2, 70, 1), (0, 5, 1)],  # single tokens
    [(1, 0, 3), (0, 6, 60), (2, 71, 1)],  # a prompt, a chunk that goes on over a border, a single token
    [(0, 66, 1), (1, 3, 1), (2, 72, 1)],
]
"""(slot, past, length) of each span."""
LONG_STEPS = [
    [(2, 0, 62), (0, 0, 100)],
    [(2, 62, 1), (0, 100, 1)],
    [(0, 101, 30), (2, 63, 1)],  # a chunk over the window's border in its ring of pages, a token on a new page
    [(0, 131, 1), (2, 64, 1)],
    [(2, 65, 127)],  # more than the window
    [(2, 192, 1), (0, 132, 1)],
]


def caches(shape, attention="auto"):
    make = dict(slots=3, max_length=LENGTH, dtype=torch.float32, device=DEVICE)
    return SlotCache([shape] * 2, **make), DeviceCache([shape] * 2, pages=8, attention=attention, **make)


@pytest.mark.parametrize(
    ("size", "options", "attention"),
    [
        ((32, 32), {}, "auto"),
        ((32, 32), {}, "torch"),
        ((32, 32), dict(window=9, sinks=True), "auto"),
        ((32, 32), dict(softcap=2.0), "auto"),
        ((32, 32), dict(softcap=2.0, window=9), "triton"),
        ((32, 32), dict(softcap=2.0), "torch"),
        ((16, 16), {}, "auto"),
        ((32, 16), {}, "auto"),
    ],
)
def test_every_step_equals_the_one_over_rows(size, options, attention):
    torch.manual_seed(0)
    sinks = torch.randn(HEADS, device=DEVICE) if options.pop("sinks", False) else None
    masking = Masking(scale=size[0] ** -0.5, sinks=sinks, **options)
    attend_alike(LayerShape(2, *size, masking.window), masking, attention, STEPS)


@pytest.mark.parametrize("window", [40, 64, 70])
def test_a_window_keeps_its_tokens_in_a_ring_of_pages(window):
    torch.manual_seed(0)
    attend_alike(LayerShape(1, 32, 32, window), Masking(scale=0.2, window=window), "torch", LONG_STEPS)


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_values_that_begin_their_keys_are_kept_once(attention):
    torch.manual_seed(0)
    shape = LayerShape(1, 40, 32, values_in_keys=True)
    assert shape.width == 40
    attend_alike(shape, Masking(scale=0.2), attention, STEPS)


@pytest.mark.parametrize("sizes", [(16, 32, 16, 16), (12, 24, 8, 16)], ids=["kernels", "no kernels"])
def test_latents_give_what_they_give_over_rows(sizes):
    torch.manual_seed(0)
    nope, rank, rope, value = sizes
    shape, masking = LayerShape(1, rank + rope, rank, values_in_keys=True), Masking(scale=0.2)
    weights = LatentWeights(
        torch.randn(HEADS, nope, rank, device=DEVICE) / 5, torch.randn(HEADS, rank, value, device=DEVICE) / 5
    )
    rows, pages = caches(shape)
    for spans in STEPS:
        batch = Batch([Span(*span) for span in spans], [0] * sum(span[2] for span in spans), DEVICE)
        assert all(pages.reserve(span.slot, span.total) for span in batch.spans)
        for layer in range(2):
            q = torch.randn(batch.size, HEADS, nope + rope, device=DEVICE)
            key = torch.randn(batch.size, rank + rope, device=DEVICE)
            expected = rows.attend_latents(layer, q, key, batch, weights, masking)
            found = pages.attend_latents(layer, q, key, batch, weights, masking)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert ("latents expanded for prompts" in pages.describe_attention()) == (rank == 32)


def attend_alike(shape, masking, attention, steps):
    rows, pages = caches(shape, attention)
    for spans in steps:
        batch = Batch([Span(*span) for span in spans], [0] * sum(span[2] for span in spans), DEVICE)
        for span in batch.spans:
            assert pages.reserve(span.slot, span.total)
        for layer in range(2):
            q = torch.randn(batch.size, HEADS, shape.head_dim, device=DEVICE)
            kv = torch.randn(batch.size, shape.width, device=DEVICE)
            expected = rows.attend(layer, q, kv.clone(), batch, masking)
            torch.testing.assert_close(pages.attend(layer, q, kv, batch, masking), expected, atol=1e-5, rtol=1e-5)


def test_pages_are_taken_and_given_back():
    _, cache = caches(LayerShape(2, 32, 32))
    assert cache.reserve(0, LENGTH) and not cache.reserve(0, LENGTH + 1)
    assert cache.reserve(1, LENGTH - PAGE_SIZE) and not cache.reserve(2, 2 * PAGE_SIZE)
    cache.release(0)
    assert cache.reserve(2, 2 * PAGE_SIZE)
    assert len(cache.tables.of[None].free) == 3


def test_a_prefill_backend_that_cannot_serve_is_refused_by_name_and_left_by_auto():
    large, plain, capped = LayerShape(1, 512, 512), Masking(scale=1.0), Masking(scale=1.0, softcap=3.0)
    assert choose("auto", large, plain, torch.float32) == Choice(
        "torch", "auto: Triton's kernels have no head sizes above 256"
    )
    with pytest.raises(ValueError, match="attention triton cannot serve this model: head sizes above 256; use"):
        choose("triton", large, plain, torch.float32)
    with pytest.raises(ValueError, match="attention flashinfer cannot serve this model: "):
        choose("flashinfer", LayerShape(2, 32, 32), capped, torch.float32)
    assert choose("auto", LayerShape(2, 256, 256), capped, torch.bfloat16).name == "triton"
