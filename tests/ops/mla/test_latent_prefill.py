"""Prompts over latents equal causal attention with keys and values expanded, in one piece or continued."""

import pytest
import torch

from shardwise.ops.mla import prefill
from shardwise.ops.mla.prefill import Run, Tile, latent_prefill_attention, runs_in_tiles
from shardwise.ops.triton_support import interpreting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)
SMALL = dict(heads=3, nope=16, rank=32, rope=16, value=32)
SPANS = [(0, 20), (7, 1), (16, 16), (15, 33), (40, 2)]
"""(tokens before, new tokens) of each sequence."""
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def check(spans, tile, *, heads, nope, rank, rope, value, dtype=torch.float32) -> None:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=DEVICE).to(dtype)  # noqa: E731
    tokens, seen = sum(new for _, new in spans), sum(past + new for past, new in spans)
    rows = draw(tokens, heads * (nope + rope) + 8)  # queries stand in wider rows
    q = rows[:, : heads * (nope + rope)].unflatten(1, (heads, -1))
    latents, key_up = draw(seen, rank + rope), draw(heads, nope, rank) / rank**0.5
    value_up, scale = draw(heads, rank, value) / rank**0.5, (nope + rope) ** -0.5
    runs, expected, query, key = [], [], 0, 0
    for past, new in spans:
        runs.append(Run(query, new, key, past))
        mine = latents[key : key + past + new].double()
        k = torch.einsum("lc,npc->nlp", mine[:, :rank], key_up.double())
        k = torch.cat((k, mine[:, rank:].expand(heads, -1, -1)), 2)
        v = torch.einsum("lc,ncd->nld", mine[:, :rank], value_up.double())
        scores = torch.einsum("tnp,nlp->ntl", q[query : query + new].double(), k) * scale
        hidden = torch.ones(new, past + new, dtype=torch.bool, device=DEVICE).triu(past + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(2)
        expected.append(torch.einsum("ntl,nld->tnd", weights, v))
        query, key = query + new, key + past + new
    tiles = torch.tensor(runs_in_tiles(runs, tile.queries), dtype=torch.int32, device=DEVICE)
    found = latent_prefill_attention(q, latents, key_up, value_up, tiles, tile, scale=scale)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)])
def test_prompts_and_their_continuations_equal_expanded_attention(tile, dtype):
    check(SPANS, tile, **SMALL, dtype=dtype)


@pytest.mark.parametrize("bytes_at_once", [1, 2 * 150 * (16 + 32) * 4])
def test_heads_that_are_expanded_one_after_another_give_the_same(monkeypatch, bytes_at_once):
    monkeypatch.setattr(prefill, "EXPANDED_BYTES", bytes_at_once)
    check(SPANS, Tile(16, 16, 4, 1), **SMALL)


def test_tiles_hold_every_query_once_and_begin_with_those_that_see_most():
    tiles = runs_in_tiles([Run(0, 70, 0, 0), Run(70, 5, 70, 200)], 32)
    assert tiles == [Run(70, 5, 70, 200), Run(64, 6, 0, 64), Run(32, 32, 0, 32), Run(0, 32, 0, 0)]


def test_sizes_that_the_kernel_does_not_take_are_named():
    with pytest.raises(ValueError, match="values of 24 elements, need a power of two from 16 to 256"):
        check([(0, 4)], Tile(16, 16, 4, 1), **{**SMALL, "value": 24})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spans", [[(0, 1000), (700, 65)], [(0, 3), (64, 64), (63, 20), (5, 9)]], ids=str)
def test_real_sizes_equal_expanded_attention(spans, dtype):
    mean = sum(new for _, new in spans) // len(spans)
    check(spans, prefill.tile_for(mean, 2), heads=16, nope=128, rank=512, rope=64, value=128, dtype=dtype)
