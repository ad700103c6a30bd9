"""Random weights: one model whatever the layout, from a config alone, of every storage type that the runtime loads."""

import json
import math
from dataclasses import replace

import pytest
import torch
from shapes import FP8, GPT_OSS, LLAMA, QWEN_MOE
from stored_forms import FORMS

from shardwise.comm.rank import current_groups
from shardwise.parallel.dummy import STD, RandomSource
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.weights import Weights
from shardwise.sharding.checkpoint.resolve import random_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

LAYOUTS = [ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(tp=3, moe_ep=3), ParallelLayout(tp=4, moe_ep=2)]
PROMPTS = [[5, 17, 100, 3, 9], [7, 7]]


@pytest.fixture
def config_file(tmp_path):
    def write(config: dict):
        path = tmp_path / "some shape.json"
        path.write_text(json.dumps(config))
        return path

    return write


def tokens(path, layout: ParallelLayout, seed: int = 0) -> list:
    made = plan(path, layout)

    def rank():
        engine = Engine(random_checkpoint(path, seed), made, current_groups())
        return [c.token_ids for c in engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, ignore_eos=True))]

    first, *others = run_threads(layout.world, rank, layout=layout)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize(
    "config",
    [LLAMA, FP8, GPT_OSS, QWEN_MOE],
    ids=["llama", "fp8 tiles", "mxfp4 experts", "moe with an expert a tensor"],
)
def test_every_layout_draws_the_same_model(config_file, config):
    path = config_file(config)
    alone, *cut = [tokens(path, layout) for layout in LAYOUTS]
    assert all(each == alone for each in cut)
    assert tokens(path, ParallelLayout(), seed=1) != alone


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_weights_can_be_drawn(config_file, form):
    path = config_file(LLAMA | {"quantization_config": form.section})
    made = plan(path, tp=2)

    def rank():
        engine = Engine(random_checkpoint(path), made, current_groups())
        engine.generate([[5, 17]], SamplingParams(max_new_tokens=2, ignore_eos=True))
        return engine.decoder.head(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))

    first, second = run_threads(2, rank, layout=made.layout)
    assert first.isfinite().all() and torch.equal(first, second)


def rank_weights(path, layout: ParallelLayout, rank: int, dtype=torch.float32) -> Weights:
    return Weights(random_checkpoint(path), plan(path, layout), rank, dtype=dtype, device=torch.device("cpu"))


def test_a_shard_is_a_part_of_the_whole_tensor(config_file):
    path = config_file(GPT_OSS)
    whole, layout = rank_weights(path, ParallelLayout(), 0), ParallelLayout(tp=4, moe_ep=2)
    block = whole.plan.model.layers[0].feed_forward[0]
    for role in ("gate_up.weight", "gate_up.scale", "down.weight", "gate_up.bias", "router.weight"):
        expected = whole.take(block, role, layer=0)
        for rank in range(4):
            weights = rank_weights(path, layout, rank)
            part = expected
            for dim, ranges in enumerate(weights.shard(block.roles[role], 0).ranges):
                part = torch.cat([part.narrow(dim, a, b - a) for a, b in ranges], dim)
            assert torch.equal(weights.take(block, role, layer=0), part), (role, rank)


@pytest.mark.parametrize("whole", [True, False], ids=["contiguous", "strided"])
def test_a_stack_is_drawn_as_its_shards_one_by_one(config_file, whole):
    made, source = plan(config_file(QWEN_MOE), tp=2), RandomSource(3)
    shards = [s for s in made.shards(1) if s.name.startswith("model.layers.1.mlp.experts") and "up_proj" in s.name]
    out = torch.empty(len(shards), 2, *shards[0].local_shape)[:, 0 if whole else 1]
    out, counted = out.contiguous() if whole else out, []
    source.fill_stack(out, shards, counted.append)
    assert counted == [sum(shard.nbytes for shard in shards)] and len(shards) > 1
    for one, shard in zip(out, shards, strict=True):
        alone = torch.empty(shard.local_shape)
        source.fill(alone, shard, counted.append)
        assert torch.equal(one, alone)


def test_weights_deviate_as_at_initialisation_and_norms_are_near_one(config_file):
    weights = rank_weights(config_file(LLAMA | {"hidden_size": 512, "vocab_size": 2000}), ParallelLayout(), 0)
    model = weights.plan.model
    table = weights.take(model.embedding, "embed.weight")
    assert abs(table.mean()) < STD / 100 and math.isclose(table.std(), STD, rel_tol=0.01)
    assert abs(torch.corrcoef(table[:2])[0, 1]) < 0.2 and abs(torch.corrcoef(table.t()[:2])[0, 1]) < 0.1
    norm = weights.take(model.final_norm, "final_norm.weight")
    assert (norm - 1).abs().max() <= 0.1


def test_packed_weights_dequantise_to_the_same_deviation(config_file):
    for config in (GPT_OSS | {"hidden_size": 256, "intermediate_size": 256}, FP8 | {"hidden_size": 256}):
        weights = rank_weights(config_file(config), ParallelLayout(), 0)
        block = weights.plan.model.layers[0].feed_forward[0]
        role = "gate_up" if "gate_up.weight" in block.roles else "up"
        values = weights.linear(block, role, layer=0)
        assert STD / 2 < values.std() < 2 * STD and values.isfinite().all()


def test_a_padded_shard_is_zero_behind_its_part(config_file):
    layout = ParallelLayout(tp=2)
    made = plan(config_file(LLAMA), layout, pad=["vocab"])
    weights = Weights(random_checkpoint(config_file(LLAMA)), made, 1,
                      dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
    table = weights.take(made.model.embedding, "embed.weight")
    held = made.shard(1, "model.embed_tokens.weight").ranges[0]
    filled = sum(b - a for a, b in held)
    assert filled < len(table) and table[:filled].abs().sum() > 0 and not table[filled:].any()


def test_storage_types_without_random_values_are_refused(config_file):
    shard = replace(plan(config_file(LLAMA)).shard(0, "model.layers.0.mlp.up_proj.weight"), dtype="I16")
    with pytest.raises(ValueError, match="up_proj.weight: no random weights of storage type I16"):
        RandomSource(0).fill(torch.empty(shard.local_shape), shard, lambda count: None)


def test_words_are_refused_as_there_is_no_tokenizer(config_file):
    path = config_file(LLAMA)
    engine = run_threads(1, lambda: Engine(random_checkpoint(path), plan(path), current_groups()))[0]
    with pytest.raises(ValueError, match="no tokenizer: pass token ids"):
        engine.generate(["hello"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [FP8, GPT_OSS], ids=["fp8 tiles", "mxfp4 experts"])
def test_a_gpu_draws_what_the_cpu_draws(config_file, config):
    made, source = plan(config_file(config)), RandomSource(0)
    for shard in made.shards(0):
        dtype = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}.get(shard.dtype, torch.bfloat16)
        here, there = (torch.empty(shard.local_shape, dtype=dtype, device=device) for device in ("cpu", "cuda"))
        for out in (here, there):
            source.fill(out, shard, lambda count: None)
        assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8)), shard.name
