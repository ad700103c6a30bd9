"""Layers that keep states: batching, chunks of prompts, slots that serve one sequence after another, and sizes."""

import random
from dataclasses import replace

import pytest
import torch
from families import NEAR_KIN
from tiny import VOCAB, generate, write

from shardwise.comm.rank import current_groups
from shardwise.ops.triton_support import interpreting
from shardwise.parallel import engine as engine_module
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import LayerShape, SlotCache
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.fitting import Holding
from shardwise.parallel.host_memory import DoesNotFit
from shardwise.parallel.sizing import RESERVED_BYTES, cache_bytes, slots_for
from shardwise.parallel.states import StateShape
from shardwise.parallel.traffic import step_bytes
from shardwise.parallel.weight_form import WeightForm
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model_type, fields = NEAR_KIN["nemotron_h"]
    return write(tmp_path_factory.mktemp("model"), model_type, **fields)


@pytest.fixture(scope="module")
def engine(folder):
    return run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))[0]


@pytest.fixture(scope="module")
def requests():
    """Prompts of 1 to 30 tokens, with answers of 1 to 12."""
    chance = random.Random(2)
    prompts = [[chance.randrange(VOCAB) for _ in range(chance.choice((1, 1, 2, 5, 30)))] for _ in range(24)]
    return prompts, [SamplingParams(max_new_tokens=chance.randint(1, 12)) for _ in prompts]


@pytest.fixture(scope="module")
def alone(engine, requests):
    """Each request's tokens by itself; test_families.py compares such with Transformers'."""
    return [tokens(engine.generate([prompt], params))[0] for prompt, params in zip(*requests, strict=True)]


def tokens(completions) -> list[list[int]]:
    return [list(c.token_ids) for c in completions]


@pytest.mark.parametrize(("batch", "step_tokens"), [(64, 2048), (5, 16), (3, 5)])
def test_tokens_depend_neither_on_batching_nor_on_chunks_nor_on_a_slots_earlier_sequences(
    engine, requests, alone, monkeypatch, batch, step_tokens
):
    monkeypatch.setattr(engine_module, "MAX_BATCH", batch)
    monkeypatch.setattr(engine_module, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(engine, "cache", None)
    assert tokens(engine.generate(*requests)) == alone


@pytest.mark.parametrize("pages", [3, 5])
def test_a_request_that_gave_up_its_place_computes_its_states_again(engine, requests, alone, monkeypatch, pages):
    monkeypatch.setattr(engine, "cache", None)
    monkeypatch.setattr(engine, "cache_tokens", pages * 16)
    assert tokens(engine.generate(*requests)) == alone


def test_what_a_stream_leaves_behind_is_not_read_by_the_next(engine, requests, alone, monkeypatch):
    monkeypatch.setattr(engine, "cache", None)
    for _ in engine.stream(*requests):
        break
    assert tokens(engine.generate(*requests)) == alone


def test_ranks_take_chunks_alike(folder, requests, alone, monkeypatch):
    monkeypatch.setattr(engine_module, "STEP_TOKENS", 7)
    few = requests[0][:6]
    answers = generate(folder, ParallelLayout(tp=2), few, max_new_tokens=1)
    assert all(tokens(answer) == [each[:1] for each in alone[:6]] for answer in answers)


def test_data_parallel_groups_without_tokens_take_part(folder, requests, alone):
    few = requests[0][:2]
    answers = generate(folder, ParallelLayout(tp=1, attn_dp=3), few, max_new_tokens=1)
    assert all(tokens(answer) == [each[:1] for each in alone[:2]] for answer in answers)


@pytest.mark.parametrize("name", ["bamba", "granite hybrid", "nemotron_h", "qwen3_next"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_the_cache_of_a_rank_is_as_large_as_planned(tmp_path, name, tp):
    model_type, fields = NEAR_KIN[name]
    made = plan(write(tmp_path, model_type, **fields), tp=tp, kv_itemsize=4)
    sizes = dict(slots=5, max_length=64, dtype=torch.float32, device=CPU)

    def rank():
        own = current_groups().world.rank
        engine = Engine(tmp_path, made, current_groups())
        shapes = engine.cache_shapes
        cache = DeviceCache(shapes, pages=2, **sizes)
        assert cache.nbytes() == cache_bytes(shapes, torch.float32, pages=2, slots=5)
        on_gpus = Holding(
            dtype=torch.float32,
            form=WeightForm.choose("auto", made.model, torch.float32, CPU, kernels=False),
            device="cuda",
            tokens=128,
            sequences=5,
            step_tokens=64,
        )
        need = on_gpus.need(made, own)
        assert (cache.states.nbytes(), cache.nbytes()) == (5 * need.states, need.cache + 5 * need.states)
        rows = SlotCache(shapes, **sizes)  # 64 tokens of 5 sequences; PyTorch's operators keep one more input
        on_hosts = replace(on_gpus, device="cpu", tokens=320).need(made, own)
        assert (rows.states.nbytes(), rows.nbytes()) == (on_hosts.states, on_hosts.cache + on_hosts.states)
        halves = replace(made, kv_itemsize=2)  # of keys, values and inputs; recurrent states stay float32
        read = step_bytes(engine.decoder, halves, own, batch=5, context=64, cache_itemsize=4)
        assert read.cache == on_hosts.cache + cache.states.nbytes()
        return need.states

    assert all(run_threads(tp, rank))


STEPS = [[(0, 0, 9)], [(1, 0, 4), (0, 9, 1)], [(1, 4, 6), (0, 10, 1), (2, 0, 1)], [(2, 1, 2), (0, 11, 1), (1, 10, 1)]]
"""(slot, past, length) of spans: prompts in chunks that cross the scan's, one of a single token, single tokens."""


@pytest.mark.skipif(not interpreting(), reason="the interpreter stands for a GPU here; see test_states_gpu.py")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_kernels_give_the_logits_of_pytorchs_operators(tmp_path):
    model_type, fields = NEAR_KIN["nemotron_h"]
    few = dict(layers_block_type=["mamba", "attention"], num_hidden_layers=2)
    made = plan(write(tmp_path, model_type, **fields | few))
    engine = run_threads(1, lambda: Engine(tmp_path, made, current_groups()))[0]
    sizes = dict(slots=3, max_length=64, dtype=torch.float32, device=CPU)
    caches = (
        SlotCache(engine.cache_shapes, **sizes),
        DeviceCache(engine.cache_shapes, pages=9, attention="torch", **sizes),
    )
    for spans in STEPS:
        batch = Batch([Span(*span) for span in spans], range(sum(length for _, _, length in spans)), CPU)
        with torch.inference_mode():
            assert all(cache.reserve(span.slot, span.total) for cache in caches for span in batch.spans)
            expected, found = (engine.decoder(batch, cache) for cache in caches)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 64])
def test_a_gpu_runs_as_many_sequences_as_there_is_room_for_their_states(monkeypatch, window):
    layers = [LayerShape(8, 64, 64, window), LayerShape(state=StateShape(1000, 4, (16, 64, 128)))]
    each = layers[1].state.nbytes(torch.bfloat16)
    free = RESERVED_BYTES + 1000
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 80 * 2**30))

    def slots(pages: int | None) -> int:
        options = dict(most=64, pages=pages, activations=1000, device=torch.device("cuda:0"))
        (found,) = run_threads(1, lambda: slots_for(layers, torch.bfloat16, world=current_groups().world, **options))
        return found

    with pytest.raises(DoesNotFit, match="rank 0 has no memory for the states of a sequence, 0 MiB"):
        slots(None)
    with pytest.raises(DoesNotFit, match="; use fewer cache_tokens, more ranks or smaller weights"):
        slots(3)
    free += 20 * each
    assert slots(None) == 10
    assert slots(3) == (20 * each - cache_bytes(layers[:1], torch.bfloat16, pages=3, slots=64)) // each == 19
    free += 200 * each
    assert slots(None) == slots(3) == 64
