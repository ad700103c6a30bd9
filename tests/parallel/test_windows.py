"""Layers with a window keep its tokens alone, in as many bytes as the plan says, and no token of an answer changes."""

import random
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from tiny import VOCAB, expected_tokens, write

from shardwise.comm.rank import current_groups
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import LayerShape, Masking, SlotCache
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.host_memory import DoesNotFit
from shardwise.parallel.paged import PagedCache, _Step
from shardwise.parallel.sizing import RESERVED_BYTES, cache_bytes, pages_for
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

CPU = torch.device("cpu")
WINDOW, LENGTH = 32, 96
ONE_RANK = ParallelLayout()
PARAMS = SamplingParams(max_new_tokens=16)


def prompts(*lengths: int) -> list[list[int]]:
    chance = random.Random(2)
    return [[chance.randrange(VOCAB) for _ in range(length)] for length in lengths]


PROMPTS = prompts(LENGTH - 16, 70, 3, 33)


def engines(folder, layout=ONE_RANK, **options) -> list[tuple[list[list[int]], Engine]]:
    """Of each rank: the tokens after PROMPTS, and the engine."""
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), **options)
        return [list(done.token_ids) for done in engine.generate(PROMPTS, PARAMS)], engine

    return run_threads(layout.world, rank, layout=layout)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """Folder and Transformers' tokens."""
    model_type, fields = FAMILIES["gpt_oss"]
    folder = write(tmp_path_factory.mktemp("model"), model_type, **{**fields, "sliding_window": WINDOW})
    return folder, expected_tokens(folder, PROMPTS, PARAMS.max_new_tokens)


@pytest.mark.parametrize("step_tokens", [2048, 40, 7])
@pytest.mark.parametrize("layout", [ONE_RANK, ParallelLayout(tp=2), ParallelLayout(attn_dp=2, moe_ep=2)], ids=str)
def test_prompts_beyond_the_window_in_any_chunks_give_transformers_tokens(gpt_oss, monkeypatch, layout, step_tokens):
    monkeypatch.setattr("shardwise.parallel.engine.STEP_TOKENS", step_tokens)
    folder, expected = gpt_oss
    assert [found for found, _ in engines(folder, layout)] == [expected] * layout.world


@pytest.mark.parametrize("pages", [6, 9, 40])
def test_requests_that_give_way_to_others_start_again_with_the_same_tokens(gpt_oss, pages):
    folder, expected = gpt_oss
    ((found, engine),) = engines(folder, cache_tokens=16 * pages)
    assert found == expected
    for window, most in ((None, pages), (WINDOW, min(pages, 64 * 2))):
        assert sorted(engine.cache.tables.of[window].free) == list(range(most))


@pytest.mark.parametrize("layout", [ONE_RANK, ParallelLayout(tp=3)], ids=str)
def test_the_cache_takes_the_bytes_of_the_plan(gpt_oss, layout):
    folder, _ = gpt_oss
    planned = plan(folder, layout, kv_itemsize=4)
    for rank, (_, engine) in enumerate(engines(folder, layout)):
        assert engine.stats().cache_bytes == planned.cache_bytes(rank, LENGTH, len(PROMPTS))
        assert engine.stats().cache == "24 pages of 16 tokens, 8 where layers keep the last 32, shared by 4 sequences"


def test_rows_serve_where_no_request_is_longer_than_the_window(tmp_path):
    folder = write(tmp_path, "mistral", sliding_window=LENGTH)
    ((found, engine),) = engines(folder)
    assert isinstance(engine.cache, SlotCache)
    assert found == expected_tokens(folder, PROMPTS, PARAMS.max_new_tokens)


@pytest.mark.parametrize("window", [1, 5, 16, 21])
def test_pages_of_a_window_attend_as_rows_do(window):
    torch.manual_seed(window)
    chance = random.Random(window)
    shape, slots = LayerShape(2, 8, 8, window), 3
    make = dict(slots=slots, max_length=200, dtype=torch.float32, device=CPU)
    rows = SlotCache([shape], **make)
    pages = PagedCache([shape], pages=39, page_size=16, **make)
    past = [0] * slots
    for _ in range(20):
        lengths = [chance.choice([1, 1, 2, 9, 17, 40]) for _ in range(slots)]
        spans = [Span(slot, past[slot], n) for slot, n in enumerate(lengths) if past[slot] + n <= 200]
        spans.sort(key=lambda span: span.length == 1)
        batch = Batch(spans, [0] * sum(span.length for span in spans), CPU)
        q, kv = torch.randn(batch.size, 4, 8), torch.randn(batch.size, 32)
        assert all(pages.reserve(span.slot, span.total) for span in spans)
        expected = rows.attend(0, q, kv.clone(), batch, Masking(scale=0.3, window=window))
        torch.testing.assert_close(pages.attend(0, q, kv, batch, Masking(scale=0.3, window=window)), expected)
        past = [past[slot] + sum(s.length for s in spans if s.slot == slot) for slot in range(slots)]
    assert max(past) > 150


def test_a_gpu_gets_the_pages_that_fit_it(monkeypatch):
    shape = LayerShape(8, 64, 64)
    layers = [shape, replace(shape, window=128)] * 12
    free = RESERVED_BYTES + 1000 + 5 * 2**30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 80 * 2**30))
    options = dict(slots=64, max_length=131072, activations=1000, device=torch.device("cuda:0"))

    def pages() -> int:
        (found,) = run_threads(1, lambda: pages_for(layers, torch.bfloat16, world=current_groups().world, **options))
        return found

    count = pages()
    sizes = [cache_bytes(layers, torch.bfloat16, pages=n, slots=64) for n in (count, count + 1)]
    assert sizes[0] <= 5 * 2**30 < sizes[1]
    assert sizes[0] == 12 * 2048 * 64 * (count + 2 * 64)
    free = RESERVED_BYTES
    with pytest.raises(DoesNotFit, match="64 tokens take 3145728 bytes"):
        pages()


def test_one_long_sequence_in_pages_does_not_pad_many_short_ones():
    cache = PagedCache([LayerShape(1, 8, 8)], pages=800, slots=64, max_length=9000, dtype=torch.float32, device=CPU)
    totals = [8000, *range(5, 68)]
    assert all(cache.reserve(slot, total) for slot, total in enumerate(totals))
    batch = Batch([Span(slot, total - 1, 1) for slot, total in enumerate(totals)], [0] * 64, CPU)
    gathered = [part.rows.numel() for part in _Step(batch, cache.tables.of[None]).parts]
    assert sum(gathered) <= 2 * sum(totals) and len(gathered) < 5
