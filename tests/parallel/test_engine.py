"""The engine on a tiny model: batching, streaming, stopping, sampling, aborts and refusals."""

import random
import weakref
from contextlib import contextmanager

import pytest
import torch
from tiny import NEW_TOKENS, PROMPTS, VOCAB, expected_tokens, write

from shardwise.comm.rank import current_groups
from shardwise.parallel import engine as engine_module
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.supported import UnsupportedModel
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def engine(folder):
    return run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))[0]


def tokens(completions) -> list[list[int]]:
    return [list(c.token_ids) for c in completions]


def alone(engine, prompts, params) -> list[list[int]]:
    return [tokens(engine.generate([p], q))[0] for p, q in zip(prompts, params, strict=True)]


def random_requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    chance = random.Random(1)
    prompts = [[chance.randrange(VOCAB) for _ in range(chance.randint(1, 30))] for _ in range(count)]
    return prompts, [SamplingParams(max_new_tokens=chance.randint(1, 12)) for _ in range(count)]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_one_prompt_at_a_time_equals_transformers(folder, tp):
    # Prompts by themselves decode in single-token steps; together (test_families.py) they go through the layers.
    made = plan(folder, tp=tp)

    def rank():
        own = Engine(folder, made, current_groups())
        assert own.runner.token_step is not None
        return alone(own, PROMPTS, [SamplingParams(max_new_tokens=NEW_TOKENS)] * len(PROMPTS))

    expected = expected_tokens(folder)
    assert all(answer == expected for answer in run_threads(tp, rank))


@pytest.mark.parametrize(("batch", "step_tokens"), [(200, 2048), (7, 16), (3, 5)])
def test_200_random_requests_do_not_depend_on_the_batching(engine, monkeypatch, batch, step_tokens):
    prompts, params = random_requests(200)
    expected = alone(engine, prompts, params)
    monkeypatch.setattr(engine_module, "MAX_BATCH", batch)
    monkeypatch.setattr(engine_module, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(engine, "cache", None)
    assert tokens(engine.generate(prompts, params)) == expected


@pytest.mark.parametrize("pages", [3, 5, 40])
def test_requests_that_share_pages_get_the_same_tokens(engine, monkeypatch, pages):
    # The longest request needs 3 pages of 16 tokens: with 3 or 5 pages, running requests have to give way to others.
    prompts, params = random_requests(60)
    expected = alone(engine, prompts, params)
    monkeypatch.setattr(engine, "cache", None)
    monkeypatch.setattr(engine, "cache_tokens", pages * 16)
    assert tokens(engine.generate(prompts, params)) == expected
    assert sorted(engine.cache.tables.of[None].free) == list(range(pages))


@pytest.mark.parametrize("tp", [2, 3])
def test_pages_on_several_ranks_and_across_page_borders(folder, tp):
    made = plan(folder, tp=tp)

    def rank():
        own = Engine(folder, made, current_groups(), cache_tokens=64)
        return tokens(own.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS)))

    expected = expected_tokens(folder)
    assert all(answer == expected for answer in run_threads(tp, rank))


def test_a_cache_that_became_too_small_is_gone_before_its_successor_is_made(folder):
    own = run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))[0]
    own.generate([[1]], SamplingParams(max_new_tokens=2))
    earlier, there, make = weakref.ref(own.cache), [], own._host_cache
    own._host_cache = lambda *sizes: there.append(earlier()) or make(*sizes)
    own.generate([[1] * 8], SamplingParams(max_new_tokens=8))
    assert there == [None]


def test_a_cache_too_small_for_one_request_is_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "cache", None)
    monkeypatch.setattr(engine, "cache_tokens", 32)
    with pytest.raises(ValueError, match="prompt 0 may become 40 tokens long .*the cache holds 32; give it more"):
        engine.generate([[1] * 10], SamplingParams(max_new_tokens=30))


def test_events_join_to_the_completions(engine):
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    completions = engine.generate(PROMPTS, params)
    events = list(engine.stream(PROMPTS, params))
    for number, completion in enumerate(completions):
        own = [event for event in events if event.request == number]
        assert tuple(event.token_id for event in own) == completion.token_ids
        assert "".join(event.text for event in own) == completion.text
        assert [event.finished for event in own] == [False] * (len(own) - 1) + [True]
        assert (own[-1].finish_reason, completion.finish_reason) == ("length", "length")
        assert completion.prompt_tokens == len(PROMPTS[number])


def test_a_stop_id_ends_the_answer_and_is_no_part_of_it(engine):
    free = tokens(engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=NEW_TOKENS)))[0]
    stop = free[5]
    (completion,) = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=(stop,)))
    assert list(completion.token_ids) == free[: free.index(stop)]
    assert completion.finish_reason == "stop"


def test_a_stop_text_ends_the_answer_before_it(engine):
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    text = engine.generate([PROMPTS[0]], params)[0].text
    stop = text[3:5]
    (completion,) = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=NEW_TOKENS, stop=stop))
    assert completion.text == text[: text.index(stop)]
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("cache_tokens", [None, 64])
def test_leaving_the_stream_early_leaves_a_working_engine(engine, monkeypatch, cache_tokens):
    monkeypatch.setattr(engine, "cache", None)
    monkeypatch.setattr(engine, "cache_tokens", cache_tokens)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    expected = tokens(engine.generate(PROMPTS, params))
    for index, _ in enumerate(engine.stream(PROMPTS, params)):
        if index == 4:
            break
    assert tokens(engine.generate(PROMPTS, params)) == expected


def test_two_streams_at_once_are_refused(engine):
    params = SamplingParams(max_new_tokens=4)
    first = engine.stream(PROMPTS, params)
    next(first)
    with pytest.raises(RuntimeError, match="another stream"):
        engine.generate(PROMPTS, params)
    first.close()
    assert len(engine.generate(PROMPTS, params)) == len(PROMPTS)


def test_a_stream_is_refused_from_another_ones_first_moment_to_its_last(engine, monkeypatch):
    params, refused = SamplingParams(max_new_tokens=1), []

    def refusing(method):
        def call(*args):
            with pytest.raises(RuntimeError, match="another stream"):
                engine.generate([[1]], params)
            refused.append(method.__name__)
            return method(*args)

        return call

    monkeypatch.setattr(engine, "_cache_for", refusing(engine._cache_for))
    monkeypatch.setattr(engine_module.Scheduler, "finish", refusing(engine_module.Scheduler.finish))
    assert len(engine.generate([[1, 2]], params)) == 1
    assert {*refused} == {"_cache_for", "finish"}


def test_steps_run_where_the_engine_is_whichever_thread_calls(engine, monkeypatch):
    """Each thread has a current GPU of its own, the first one unless it says otherwise."""
    launch, use, inside, steps = engine.runner.launch, engine.runner.use, [], []
    third = torch.device("cuda", 3)

    @contextmanager
    def current(device):
        inside.append(device.index)
        yield
        inside.pop()

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", current)
        patch.setattr(engine, "device", third)
        with engine._here():
            assert inside == [3]
    monkeypatch.setattr(engine, "_here", lambda: current(third))
    monkeypatch.setattr(engine.runner, "launch", lambda step: steps.append([*inside]) or launch(step))
    monkeypatch.setattr(engine.runner, "use", lambda cache: steps.append([*inside]) or use(cache))
    assert len(engine.generate([[1, 2]], SamplingParams(max_new_tokens=2))[0].token_ids) == 2
    assert steps == [[3]] * 3 and not inside


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(engine):
    def params(seed):
        return SamplingParams(max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.9, seed=seed)

    (first,) = tokens(engine.generate([PROMPTS[0]], params(3)))
    batched = tokens(engine.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2]], [params(1), params(3), params(2)]))
    assert batched[1] == first
    assert tokens(engine.generate([PROMPTS[0]], params(4)))[0] != first


def test_all_ranks_sample_the_same_tokens_without_a_seed(folder):
    made = plan(folder, tp=3)

    def rank():
        own = Engine(folder, made, current_groups())
        return tokens(own.generate(PROMPTS, SamplingParams(max_new_tokens=8, temperature=2.0)))

    answers = run_threads(3, rank)
    assert answers[0] == answers[1] == answers[2]


def test_the_context_ends_an_answer(engine):
    prompt = [5] * (engine.max_length - 3)
    (completion,) = engine.generate([prompt], SamplingParams(max_new_tokens=50))
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


REFUSED = {
    "prompt longer than the context": ([[1] * 128], None, ValueError, "prompt 0 has 128 tokens.*context holds 128"),
    "empty prompt": ([[1], []], None, ValueError, "prompt 1 has no tokens"),
    "id outside of the vocabulary": ([[VOCAB]], None, ValueError, f"token id {VOCAB} is not in the vocabulary"),
    "one text instead of a list": ("text", None, TypeError, "pass a list of prompts"),
    "wrong number of parameters": ([[1]], [SamplingParams()] * 2, ValueError, "1 prompts with 2 sampling parameters"),
    "no parameters": ([[1]], [], ValueError, "1 prompts with 0 sampling parameters"),
    "no chat template": ([[{"role": "user", "content": "hi"}]], None, ValueError, "no chat template"),
}


@pytest.mark.parametrize(("prompts", "params", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_requests_that_cannot_run_are_refused(engine, prompts, params, kind, message):
    with pytest.raises(kind, match=message):
        engine.generate(prompts, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, legal: a whole number of at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"stop": ("a", "")}, "stop is"),
        ({"seed": 2**64}, r"seed is 18446744073709551616, legal: from -2\*\*63 to 2\*\*64 - 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', legal: a whole number of at least 1"),
        ({"temperature": "hot"}, "temperature is 'hot', legal: a number of at least 0"),
        ({"stop_token_ids": ("2",)}, "stop_token_ids is"),
        ({"stop_token_ids": 2}, "stop_token_ids is 2, legal: a list of whole numbers"),
        ({"stop": 5}, "stop is 5, legal: texts that are not empty"),
    ],
)
def test_sampling_parameters_outside_of_their_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_a_plan_for_another_number_of_ranks_is_refused(folder):
    with pytest.raises(ValueError, match="the plan is for 2 ranks, the job has 1"):
        run_threads(1, lambda: Engine(folder, plan(folder, tp=2), current_groups()))


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="dtype 'int3' is unknown, legal: auto, float32"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), dtype="int3"))


def test_a_model_without_layers_here_is_refused_before_its_weights_are_read(tmp_path):
    folder = write(
        tmp_path,
        "gpt2",
        n_embd=48,
        n_head=6,
        n_layer=2,
        n_positions=64,
    )
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))


def test_bfloat16_weights_take_half_the_memory(folder):
    def weight_bytes(dtype):
        return run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), dtype=dtype).stats())[
            0
        ].weight_bytes

    assert weight_bytes("bfloat16") == pytest.approx(weight_bytes(torch.float32) / 2, rel=0.01)
