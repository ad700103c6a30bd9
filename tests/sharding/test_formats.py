"""Every storage format: which tensors a linear becomes, that their bytes are right and their cuts stay together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.sharding.axes import Axis, LogicalAxis, along, fixed
from shardwise.sharding.config import Config, ConfigError
from shardwise.sharding.cutting import IllegalLayout
from shardwise.sharding.formats import Linear
from shardwise.sharding.plan import plan
from shardwise.sharding.quantization import NamePatterns, quantization_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 2000,
    "torch_dtype": "bfloat16",
}
COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


def compressed(weights, form="float-quantized"):
    return {**COMPRESSED, "format": form, "config_groups": {"g": {"weights": weights, "targets": ["Linear"]}}}


UP = "model.layers.0.mlp.up_proj"
QUANTIZED = {
    "fp8 per tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"weight": ((3072, 1024), "F8_E4M3"), "weight_scale": ((), "F32"), "input_scale": ((), "F32")},
    ),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"weight": ((3072, 1024), "F8_E4M3"), "weight_scale_inv": ((24, 8), "F32")},
    ),
    "nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        {
            "weight": ((3072, 512), "U8"),
            "weight_scale": ((3072, 64), "F8_E4M3"),
            "weight_scale_2": ((), "F32"),
            "input_scale": ((), "F32"),
        },
    ),
    "gptq": (
        GPTQ,
        {
            "qweight": ((128, 3072), "I32"),
            "qzeros": ((8, 384), "I32"),
            "scales": ((8, 3072), "F16"),
            "g_idx": ((1024,), "I32"),
        },
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"qweight": ((1024, 384), "I32"), "qzeros": ((8, 384), "I32"), "scales": ((8, 3072), "F16")},
    ),
    "int4 packed": (
        compressed(INT4, "pack-quantized"),
        {
            "weight_packed": ((3072, 128), "I32"),
            "weight_scale": ((3072, 8), "BF16"),
            "weight_shape": ((2,), "I64"),
        },
    ),
    "fp8 channels": (
        compressed(FP8_CHANNEL),
        {"weight": ((3072, 1024), "F8_E4M3"), "weight_scale": ((3072, 1), "BF16")},
    ),
    "fp8 rows": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        {
            "weight": ((3072, 1024), "F8_E4M3"),
            "weight_scale": ((3072, 1), "F32"),
            "input_scale_ub": ((1,), "F32"),
        },
    ),
    "nvfp4 packed": (
        compressed({"num_bits": 4, "type": "float"}, "nvfp4-pack-quantized"),
        {
            "weight_packed": ((3072, 512), "U8"),
            "weight_scale": ((3072, 64), "F8_E4M3"),
            "weight_global_scale": ((1,), "F32"),
            "input_global_scale": ((1,), "F32"),
        },
    ),
}


def config_of(method):
    return LLAMA | {"quantization_config": QUANTIZED[method][0]}


@pytest.mark.parametrize("method", QUANTIZED)
def test_stored_tensors_of_a_linear(method):
    made = plan(config_of(method))
    found = {s.name.removeprefix(UP + "."): (s.global_shape, s.dtype) for s in made.shards(0) if s.name.startswith(UP)}
    assert found == QUANTIZED[method][1]


@pytest.mark.parametrize("method", QUANTIZED)
def test_packed_words_and_scales_do_not_count_as_parameters(method):
    assert plan(config_of(method)).parameters == plan(LLAMA).parameters


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("tp", [2, 3, 4, 5, 8])
def test_weights_and_scales_are_cut_at_the_same_places(method, tp):
    made = plan(config_of(method), tp=tp)
    for rank in range(tp):
        for projection, dim in (("up_proj", 0), ("down_proj", 1), ("o_proj", 1), ("k_proj", 0)):
            parts = {s.role.split(".")[1]: s for s in made.shards(rank) if f"layers.1.{_module(projection)}." in s.name}
            logical = {role: _logical(s, dim) for role, s in parts.items() if _logical(s, dim) is not None}
            assert len({tuple(r) for r in logical.values()}) == 1, (projection, logical)


def _module(projection):
    return f"self_attn.{projection}" if projection[0] in "ok" else f"mlp.{projection}"


def _logical(shard, dim):
    """Ranges of the out (0) or in (1) dim in elements of the weight; None where the tensor lacks that dim."""
    lengths = {0: _OUT, 1: _IN}[dim]
    for full, ranges in zip(shard.global_shape, shard.ranges, strict=True):
        total = lengths[_key(shard.name)]
        if full > 2 and total % full == 0 and ranges != ((0, full),):
            return [(a * total // full, b * total // full) for a, b in ranges]
    return None


_OUT = {"up_proj": 3072, "down_proj": 1024, "o_proj": 1024, "k_proj": 512}
_IN = {"up_proj": 1024, "down_proj": 3072, "o_proj": 1024, "k_proj": 1024}


def _key(name):
    return next(k for k in _OUT if f".{k}." in name)


def test_act_order_keeps_all_scales_of_a_row_parallel_weight():
    act_order = LLAMA | {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    }
    made = plan(act_order, tp=2)
    down = {s.role: s.local_shape for s in made.shards(1) if "layers.0.mlp.down_proj" in s.name}
    assert down["down.weight"] == (192, 1024)
    assert down["down.scale"] == (24, 1024)
    assert down["down.group_index"] == (1536,)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_one_group_of_all_inputs_may_be_cut_anywhere(method):
    config = LLAMA | {"quantization_config": {**QUANTIZED[method][0], "group_size": -1}}
    scales = [plan(config, tp=3).shard(r, "model.layers.0.mlp.down_proj.scales").local_shape for r in range(3)]
    assert scales == [(1, 1024)] * 3


def test_integers_with_zero_points_have_them_beside_their_scales():
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    made = plan(LLAMA | {"quantization_config": compressed(weights, "int-quantized")}, tp=2)
    zeros = made.shard(1, f"{UP}.weight_zero_point")
    assert (zeros.dtype, zeros.ranges) == ("I8", made.shard(1, f"{UP}.weight_scale").ranges)


@pytest.mark.parametrize(("order", "has_index"), [("group", True), ("weight", False), ("static", False), (None, False)])
def test_an_order_of_activations_has_an_index_where_it_changes_groups(order, has_index):
    made = plan(LLAMA | {"quantization_config": compressed({**INT4, "actorder": order}, "pack-quantized")})
    assert (f"{UP}.weight_g_idx" in made.names()) is has_index


def test_blocks_that_do_not_divide_stay_whole_and_uneven():
    config = LLAMA | {"intermediate_size": 1408, "quantization_config": QUANTIZED["fp8 blocks"][0]}
    made = plan(config, tp=3)
    lengths = [made.shard(r, f"{UP}.weight").local_shape[0] for r in range(3)]
    assert lengths == [4 * 128, 4 * 128, 3 * 128]
    assert any("1408 mlp on 3 ranks are uneven in blocks of 128" in w for w in made.warnings)


def test_too_few_blocks_are_refused_with_ways_out():
    config = LLAMA | {"intermediate_size": 256, "quantization_config": QUANTIZED["fp8 blocks"][0]}
    with pytest.raises(IllegalLayout, match=r"256 mlp units are 2 blocks of 128, too few for 4 ranks") as error:
        plan(config, tp=4)
    assert "--pad mlp" in str(error.value) and "smaller tp (at most 2)" in str(error.value)
    padded = plan(config, tp=4, pad=["mlp"])
    assert [padded.shard(r, f"{UP}.weight").local_shape[0] for r in range(4)] == [128] * 4
    assert [padded.shard(r, f"{UP}.weight").ranges[0] for r in range(4)] == [((0, 128),), ((128, 256),), (), ()]


def test_heads_smaller_than_a_block_share_it_and_say_so():
    config = LLAMA | {"head_dim": 64, "quantization_config": QUANTIZED["fp8 blocks"][0]}
    made = plan(config, tp=4)
    scales = [made.shard(r, "model.layers.0.self_attn.k_proj.weight_scale_inv").ranges[0] for r in range(4)]
    assert scales == [((0, 1),), ((0, 1),), ((1, 2),), ((1, 2),)]
    assert any("share a quantisation block" in w for w in made.warnings)
    assert not any("share a quantisation block" in w for w in plan(config, tp=2).warnings)


def test_the_first_name_of_compressed_tensors_section_counts():
    section = compressed(INT4, "pack-quantized")
    assert plan(LLAMA | {"compression_config": section}).ranks == plan(LLAMA | {"quantization_config": section}).ranks


def test_the_head_is_plain_unless_it_is_named():
    plain = plan(config_of("gptq")).shard(0, "lm_head.weight")
    assert plain.dtype == "BF16"
    named = {**QUANTIZED["gptq"][0], "lm_head": True}
    assert plan(LLAMA | {"quantization_config": named}).shard(0, "lm_head.qweight").dtype == "I32"


def test_rules_for_single_modules_of_gptq_count():
    rules = {
        "-:.*mlp.down": {},
        r"+:.*layers\.1\.mlp\.up": {"bits": 8, "group_size": 32},
        ".*o_proj": {"desc_act": True},
    }
    made = plan(LLAMA | {"quantization_config": {**GPTQ, "dynamic": rules}})
    layers = [{s.name.split(f"layers.{n}.")[1]: s for s in made.shards(0) if f"layers.{n}." in s.name} for n in (0, 1)]
    assert layers[0]["mlp.down_proj.weight"].dtype == "BF16"
    assert [layer["mlp.up_proj.qweight"].global_shape for layer in layers] == [(128, 3072), (256, 3072)]
    assert [layer["mlp.up_proj.scales"].global_shape for layer in layers] == [(8, 3072), (32, 3072)]


def test_layers_that_are_stored_differently_are_told_apart():
    ignore = ["lm_head", "model.layers.0*"]
    config = LLAMA | {"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt", "ignore": ignore}}
    made = plan(config)
    assert made.shard(0, "model.layers.0.mlp.up_proj.weight").dtype == "BF16"
    assert made.shard(0, "model.layers.1.mlp.up_proj.weight").dtype == "U8"


def test_a_table_of_modules_picks_their_formats():
    table = {
        "model.layers.1.mlp.up_proj": {"quant_algo": "FP8"},
        "model.layers.1.mlp.down_proj": {"quant_algo": "NVFP4"},
    }
    config = LLAMA | {"hf_quant_config": {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": table}}}
    made = plan(config)
    assert [made.shard(0, f"model.layers.1.mlp.{p}_proj.weight").dtype for p in ("up", "down", "gate")] == [
        "F8_E4M3",
        "U8",
        "BF16",
    ]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "magic"}, 'quant_method is "magic", expected'),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits is 3, expected 2, 4 or 8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two positive integers"),
        ({"quant_algo": "FP2"}, 'quant_algo is "FP2"'),
        ({"quant_method": "modelopt"}, "quant_algo is null, expected FP8 or"),
        ({"load_in_4bit": True}, "quant_method is null, expected"),
        ({**GPTQ, "checkpoint_format": "marlin"}, 'checkpoint_format is "marlin", expected gptq or gptq_v2'),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format is true, expected false"),
        ({**GPTQ, "dynamic": {"+:up_proj": {"bits": 5}}}, "bits is 5, expected 2, 4 or 8"),
        ({**GPTQ, "dynamic": {"-:(": {}}}, "are not a regular expression"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, 'version is "gemv", expected gemm'),
        ({**COMPRESSED, "format": "pack-quantized"}, "config_groups is {}, expected at least one group"),
        (compressed({**FP8_CHANNEL, "strategy": "block"}), "block_structure is null, expected two positive integers"),
        (compressed({**FP8_CHANNEL, "strategy": "block", "block_structure": [128]}), "block_structure is [128]"),
        (compressed({**FP8_CHANNEL, "strategy": "group"}), 'strategy is "group", expected tensor, channel or block'),
        (compressed({**INT4, "num_bits": 3}, "pack-quantized"), "num_bits is 3, expected 2, 4 or 8"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "bits is 8, expected 4"),
        ({"quant_method": "awq", "bits": 4, "q_group_size": 0}, "is 0, expected a number of inputs, or -1"),
        ({**GPTQ, "group_size": 0}, "group_size is 0, expected a number of inputs, or -1 for whole rows"),
        (compressed({**INT4, "group_size": 0}, "pack-quantized"), "group_size is 0, expected a number of inputs"),
        (compressed({**INT4, "num_bits": 40}, "pack-quantized"), "num_bits is 40, expected an integer from 1 to 8"),
        (
            compressed(FP8_CHANNEL) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            'sparsity_config.format is "sparse-24-bitmask", expected dense',
        ),
    ],
)
def test_unknown_methods_are_named(section, words):
    with pytest.raises(ConfigError) as error:
        quantization_of(Config({"quantization_config": section}, "c.json"))
    assert words in str(error.value) and "c.json" in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "module", "hit"),
    [
        ("lm_head", "lm_head", True),
        ("gate", "model.layers.3.mlp.gate", True),
        ("gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("re:.*self_attn.*", "model.layers.7.self_attn.q_proj", True),
        (r"re:.*mlp\.(gate|up)_proj.*", "model.layers.0.mlp.experts.0.up_proj", False),
        ("model.layers.0*", "model.layers.0.mlp.up_proj", True),
    ],
)
def test_name_patterns(pattern, module, hit):
    assert NamePatterns([pattern]).match(module) is hit


@given(st.integers(1, 40), st.sampled_from([1, 2, 8, 16, 32, 64, 128]), st.integers(1, 8))
def test_stored_bytes_of_a_coarse_dim(units, size, per):
    axis = LogicalAxis(Axis.MLP, units)
    assert along(axis, size).coarse(per).length == -(-units * size // per)
    assert Linear("r", "m", along(axis, size), fixed(4), "BF16").weight("BF16").shape == (units * size, 4)
