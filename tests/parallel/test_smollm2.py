"""The real model at several layouts: the same greedy tokens as Transformers, and no rank with more than its part."""

from functools import cache

import pytest
import torch

from shardwise.comm.rank import current_groups
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

QUESTIONS = [
    "Name three primary colors.",
    "Explain why the sky is blue.",
    "Write a short poem about the sea.",
    "What is 12 times 12?",
    "List the planets of the solar system.",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, smollm2_path):
    """(plan, each rank's prompt ids, completions, stats, reports of progress)."""
    made = plan(smollm2_path, tp=request.param)

    def rank():
        reports = []
        engine = Engine(smollm2_path, made, current_groups(), on_progress=lambda *report: reports.append(report))
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        ids = [engine.tokenizer.encode_chat(chat) for chat in chats]
        return ids, engine.generate(chats, params), engine.stats(), reports

    return made, run_threads(request.param, rank)


@pytest.fixture(scope="module")
def choices(transformers_model):
    """(prompt, answer) -> Transformers' most likely token behind the prompt, and behind each token of the answer but
    the last. One pass gives all: where they are the answer, its greedy decoding takes the same path."""

    @cache
    def made(prompt, answer):
        with torch.inference_mode():
            logits = transformers_model(torch.tensor([prompt + answer])).logits[0]
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist()

    return made


def test_greedy_tokens_equal_transformers(run, choices, transformers_tokenizer):
    _, ranks = run
    prompts, completions, _, _ = ranks[0]
    for question, prompt, completion in zip(QUESTIONS, prompts, completions, strict=True):
        chat = [{"role": "user", "content": question}]
        reference = transformers_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        assert prompt == list(reference["input_ids"])
        tokens = list(completion.token_ids)
        assert len(tokens) == NEW_TOKENS
        assert choices(tuple(prompt), tuple(tokens)) == tokens


def test_every_rank_has_the_same_result(run):
    _, ranks = run
    assert all(completions == ranks[0][1] for _, completions, _, _ in ranks)
    assert "red" in ranks[0][1][0].text.lower()


def test_weights_of_all_ranks_are_one_copy_and_the_declared_replication(run):
    made, ranks = run
    one_copy = 4 * made.parameters
    replicated = 4 * (sum(total.parameters for total in made.ranks) - made.parameters)
    held = sum(stats.weight_bytes for _, _, stats, _ in ranks)
    assert held == pytest.approx(one_copy + replicated, rel=1e-4)  # rotary frequencies besides the weights
    assert held <= 1.02 * one_copy  # only norms are replicated here


def test_progress_ends_at_what_the_plan_says_a_rank_reads(run):
    made, ranks = run
    for rank, (_, _, _, reports) in enumerate(ranks):
        done, total = zip(*reports, strict=True)
        assert list(done) == sorted(done)
        assert done[-1] == pytest.approx(total[-1], rel=0.01)
        assert total[-1] == made.rank(rank).weight_bytes
