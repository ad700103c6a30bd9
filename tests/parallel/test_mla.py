"""Latent attention keeps one latent a token, as the plan counts it, whatever holds the cache and cuts the prompts."""

import pytest
from tiny import NEW_TOKENS, PROMPTS

from shardwise.comm.rank import current_groups
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

TOKENS = 64
"""Of the cache: pages of 16."""


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("step_tokens", [2048, 5])
def test_latents_in_pages_and_prompts_in_chunks_give_transformers_tokens(checkpoint_of, monkeypatch, name, step_tokens):
    monkeypatch.setattr("shardwise.parallel.engine.STEP_TOKENS", step_tokens)
    folder, expected = checkpoint_of(name)
    layout = ParallelLayout(tp=2)
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), cache_tokens=TOKENS)
        done = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS))
        return [list(each.token_ids) for each in done], engine.stats().cache_bytes

    per_token = made.cache_bytes(0, 1, 1) // made.kv_itemsize * 4
    assert run_threads(2, rank, layout=layout) == [(expected, TOKENS * per_token)] * 2
