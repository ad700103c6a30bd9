"""Gated delta layers compute what Transformers' do, however prompts are cut, batched and split over ranks."""

import pytest
import torch
from tiny import NEW_TOKENS, PROMPTS
from transformers import AutoModelForCausalLM

from shardwise.comm.rank import current_groups
from shardwise.parallel.assemble import DecoderBuilder
from shardwise.parallel.assemble_delta import gated_delta
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import SlotCache
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.weights import Weights
from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

CPU = torch.device("cpu")
LENGTHS = (10, 4, 70, 3)
"""Tokens of four sequences; one is longer than a chunk of the delta rule."""
SLOTS = (2, 0, 1, 0)
"""The last sequence takes the place of the second."""
STEPS = [
    [(0, 0, 7), (1, 0, 1)],
    [(0, 7, 9), (2, 0, 66), (1, 1, 2)],
    [(1, 2, 4), (0, 9, 10), (2, 66, 67)],
    [(2, 67, 70), (3, 0, 2)],
    [(3, 2, 3)],
]
"""(sequence, first token, end): prompts whole and in pieces, single tokens beside them and alone."""


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_the_mixer_equals_transformers_whatever_the_steps_and_the_ranks(checkpoint_of, tp):
    folder, _ = checkpoint_of("qwen3_next")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].linear_attn
    made, layout = plan(folder, tp=tp), ParallelLayout(tp=tp)
    x = [torch.randn(n, made.model.hidden, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]

    def rank():
        groups = current_groups()
        builder = DecoderBuilder(
            Weights(open_checkpoint(folder), made, groups.world.rank, dtype=torch.float32, device=CPU), groups
        )
        mixer = gated_delta(builder, made.model.layers[0].mixers[0], 0)
        cache = SlotCache(builder.cache_shapes(), slots=3, max_length=80, dtype=torch.float32, device=CPU)
        out = [torch.zeros_like(tokens) for tokens in x]
        for step in STEPS:
            spans = [Span(SLOTS[n], start, end - start) for n, start, end in step]
            batch = Batch(spans, [0] * sum(span.length for span in spans), CPU)
            done = mixer(torch.cat([x[n][start:end] for n, start, end in step]), batch, cache)
            for (n, start, end), rows in zip(step, done.split([span.length for span in spans]), strict=True):
                out[n][start:end] = rows
                if end == LENGTHS[n]:
                    cache.release(SLOTS[n])
        return out

    with torch.inference_mode():
        ranks = run_threads(tp, rank, layout=layout)
        for tokens, parts in zip(x, zip(*ranks, strict=True), strict=True):
            torch.testing.assert_close(sum(parts), theirs(tokens[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "step_tokens", "slots"),
    [
        ("qwen3_next", {}, 5, 2),
        ("qwen3_next", {"cache_tokens": 32}, 2048, 64),
    ],
)
def test_prompts_in_pieces_and_requests_that_wait_or_give_way_get_the_same_tokens(
    checkpoint_of, monkeypatch, name, options, step_tokens, slots
):
    # 32 tokens of cache hold one of the longer requests: others lose their states and compute them again.
    monkeypatch.setattr("shardwise.parallel.engine.STEP_TOKENS", step_tokens)
    monkeypatch.setattr("shardwise.parallel.engine.MAX_BATCH", slots)
    folder, expected = checkpoint_of(name)
    made = plan(folder, tp=2)

    def rank():
        engine = Engine(folder, made, current_groups(), **options)
        return [list(c.token_ids) for c in engine.generate(PROMPTS * 2, SamplingParams(max_new_tokens=NEW_TOKENS))]

    assert run_threads(2, rank) == [expected * 2] * 2
