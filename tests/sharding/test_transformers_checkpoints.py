"""Checkpoints written by Transformers: bytes to the byte, and all ranks' slices together are the model again."""

import re

import numpy as np
import pytest
from safetensors import safe_open
from tiny_models import MODELS, write

from shardwise.sharding.checkpoint.safetensors import read_safetensors_folder
from shardwise.sharding.plan import plan

NOT_TEXT = re.compile("visual|vision|multi_modal")
LAYOUTS = [{"tp": 1}, {"tp": 2}, {"tp": 3, "ep": 3}, {"tp": 4, "ep": 2}, {"tp": 2, "attn_dp": 2, "ep": 4}]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """(folder, all tensors) of one tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return folder, tensors


def take(array, ranges):
    """The elements of `array` inside the ranges of every dim."""
    for axis, dim in enumerate(ranges):
        array = np.take(array, [i for a, b in dim for i in range(a, b)], axis=axis)
    return array


def put(full, part, ranges):
    """Write `part` back to where it was taken from."""
    full[np.ix_(*([i for a, b in dim for i in range(a, b)] for dim in ranges))] = part


def test_every_byte_of_the_text_model_is_planned(checkpoint):
    folder, _ = checkpoint
    entries = read_safetensors_folder(folder)
    text = {name: entry.nbytes for name, entry in entries.items() if not NOT_TEXT.search(name)}
    made = plan(folder)
    assert set(made.names()) == set(text)
    assert made.ranks[0].weight_bytes == sum(text.values())
    assert {s.name: s.nbytes for s in made.shards(0)} == text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon-h1", {"mamba_proj_bias": True}),
        ("falcon-h1", {"projectors_bias": True}),
        ("bamba", {"mlp_bias": True}),
        ("nemotron-h", {"use_bias": True, "mlp_bias": True}),
        ("gemma4", {"attention_bias": True}),
        ("gemma4", {"tie_word_embeddings": False}),  # the whole model ties them
        ("qwen3-vl", {"tie_word_embeddings": True}),  # the whole model does not
        ("deepseek-v2-lite", {"mlp_bias": True, "attention_bias": True}),
    ],
    ids=str,
)
def test_flags_of_a_config_add_the_tensors_that_transformers_adds(tmp_path, name, changes):
    write(name, tmp_path, **changes)
    entries = read_safetensors_folder(tmp_path)
    text = {name: entry.nbytes for name, entry in entries.items() if not NOT_TEXT.search(name)}
    for source in (tmp_path, tmp_path / "config.json"):
        assert {s.name: s.nbytes for s in plan(source).shards(0)} == text


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_slices_of_all_ranks_are_the_model(checkpoint, layout):
    folder, tensors = checkpoint
    made = plan(folder, **layout)
    merged = {name: np.full(tensors[name].shape, np.nan, tensors[name].dtype) for name in made.names()}
    for rank in range(made.layout.world):
        for shard in made.shards(rank):
            part = take(tensors[shard.name], shard.ranges)
            assert part.shape == shard.local_shape and part.nbytes == shard.nbytes
            put(merged[shard.name], part, shard.ranges)
    for name, array in merged.items():
        assert np.array_equal(array, tensors[name]), name


@pytest.mark.parametrize(
    "architecture, fields, parameters",
    [
        ("SmolLM3ForCausalLM", {}, 3_075_098_624),
        ("GraniteForCausalLM", {}, 6_738_415_616),
        ("Ernie4_5ForCausalLM", {}, 360_748_032),
        ("Glm4ForCausalLM", {}, 9_400_279_040),
        ("HunYuanDenseV1ForCausalLM", {"head_dim": 128}, 8_859_684_864),
    ],
)
def test_a_model_of_its_default_sizes_has_the_tensors_of_transformers(architecture, fields, parameters):
    import torch
    import transformers

    cls = getattr(transformers, architecture)
    config = cls.config_class(**fields)
    with torch.device("meta"):
        held = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
    if config.tie_word_embeddings:
        del held["lm_head.weight"]
    made = plan(config.to_dict() | {"architectures": [architecture]})
    assert {shard.name: shard.local_shape for shard in made.shards(0)} == held
    assert made.parameters == parameters
