"""Quantised checkpoints on disk: bytes of the plan are bytes of the file, in every format, and all ranks cover them."""

import json

import numpy as np
import pytest
from published_models import CONFIGS
from test_formats import LLAMA, QUANTIZED
from tiny_models import LATENT

from shardwise.sharding.checkpoint.safetensors import read_safetensors_folder
from shardwise.sharding.plan import plan

SMALL = LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
SMALL_GPT_OSS = {
    **{k: v for k, v in CONFIGS["openai/gpt-oss-20b"].items() if k != "layer_types"},
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 100,
    "num_local_experts": 4,
}
SMALL_DEEPSEEK = {
    **CONFIGS["deepseek-ai/DeepSeek-V3"],
    **LATENT,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "moe_intermediate_size": 384,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 128,
}
CONFIGURATIONS = {
    **{f"llama {method}": SMALL | {"quantization_config": section} for method, (section, _) in QUANTIZED.items()},
    **{f"moe {method}": SMALL | MOE | {"quantization_config": section} for method, (section, _) in QUANTIZED.items()},
    "gpt-oss mxfp4": SMALL_GPT_OSS,
    "deepseek fp8": SMALL_DEEPSEEK,
}


def with_extras(model):
    """The plan of all that the checkpoint holds."""
    return plan(model, extras=[extra.name for extra in plan(model).model.extras])


def write(folder, config):
    """Random bytes in the shapes and types that the config announces, MTP layers included, as one safetensors file."""
    rng = np.random.default_rng(0)
    header, blobs, offset = {}, {}, 0
    for shard in with_extras(config).shards(0):
        end = offset + shard.nbytes
        header[shard.name] = {
            "dtype": shard.dtype,
            "shape": list(shard.global_shape),
            "data_offsets": [offset, end],
        }
        blobs[shard.name] = rng.integers(0, 256, shard.nbytes, np.uint8)
        offset = end
    text = json.dumps(header).encode()
    data = b"".join(blob.tobytes() for blob in blobs.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config))
    return blobs


@pytest.fixture(params=CONFIGURATIONS)
def checkpoint(request, tmp_path):
    return tmp_path, write(tmp_path, CONFIGURATIONS[request.param])


def test_bytes_of_a_plan_are_bytes_of_the_file(checkpoint):
    folder, blobs = checkpoint
    made = with_extras(folder)
    entries = read_safetensors_folder(folder)
    assert {s.name: s.nbytes for s in made.shards(0)} == {name: entry.nbytes for name, entry in entries.items()}
    assert made.ranks[0].weight_bytes == sum(len(blob) for blob in blobs.values())
    assert not made.warnings


def test_a_scale_of_a_tensor_may_be_stored_with_or_without_a_dim(tmp_path):
    """compressed-tensors and others write [1], older tools []."""
    config = CONFIGURATIONS["llama fp8 per tensor"]
    write(tmp_path, config)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = "model.layers.1.mlp.up_proj.weight_scale"
    header[changed]["shape"] = [1]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    made = plan(tmp_path, tp=2)
    assert made.shard(1, changed).global_shape == (1,)
    assert made.shard(1, changed.replace("1", "0")).global_shape == ()
    assert made.ranks == plan(config, tp=2).ranks


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 3, "ep": 3}, {"tp": 2, "attn_dp": 2, "ep": 2}], ids=str)
def test_slices_of_all_ranks_are_the_file(checkpoint, layout):
    folder, blobs = checkpoint
    made = plan(folder, **layout)
    merged = {s.name: np.zeros((*s.global_shape, itemsize(s)), np.uint8) for s in plan(folder).shards(0)}
    for rank in range(made.layout.world):
        for shard in made.shards(rank):
            source = blobs[shard.name].reshape(*shard.global_shape, itemsize(shard))
            index = np.ix_(*([i for a, b in dim for i in range(a, b)] for dim in shard.ranges), range(itemsize(shard)))
            assert source[index].nbytes == shard.nbytes
            merged[shard.name][index] = source[index]
    for name, array in merged.items():
        assert np.array_equal(array.ravel(), blobs[name]), name


def itemsize(shard):
    return shard.nbytes // max(1, int(np.prod(shard.local_shape)))
