"""Options of config.json that change the maths of a family: each gives Transformers' tokens, or is refused."""

import json

import pytest
import torch
from families import LATENT, MAMBA, MOE_FAMILIES
from safetensors.torch import load_file, save_file
from tiny import VOCAB, expected_tokens, generate, write

from shardwise.sharding.config import ConfigError
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan

ONE_RANK = ParallelLayout()
SWITCHED_ON = dict(use_sliding_window=True, sliding_window=3)
TYPES = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
QWEN2_MOE, QWEN3_MOE, GPT_OSS = (
    MOE_FAMILIES[name][1] for name in ("qwen2_moe", "qwen3_moe with a dense layer", "gpt_oss")
)
DEEPSEEK = dict(LATENT, q_lora_rank=20)
ROPES = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=50000.0),
    sliding_attention=dict(rope_type="linear", factor=2.0, rope_theta=2000.0),
)
OPTIONS: dict[str, tuple[str, dict]] = {
    "Qwen2 names its windowed layers": ("qwen2", dict(SWITCHED_ON, **TYPES)),
    "Qwen3 counts its full layers": ("qwen3", dict(SWITCHED_ON, max_window_layers=1)),
    "Qwen2-MoE has windows in every other layer": ("qwen2_moe", dict(QWEN2_MOE, **SWITCHED_ON, max_window_layers=2)),
    "Qwen3-MoE has windows in all": ("qwen3_moe", dict(QWEN3_MOE, **SWITCHED_ON, max_window_layers=1)),
    "Gemma 3 caps no scores": ("gemma3_text", dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=16)),
    "Gemma 3 stretches both rotations": ("gemma3_text", dict(TYPES, sliding_window=3, rope_parameters=ROPES)),
    "OLMo 3 has two rotations": ("olmo3", dict(TYPES, sliding_window=3, rope_parameters=ROPES)),
    "gpt-oss has another slope": ("gpt_oss", dict(GPT_OSS, swiglu_alpha=1.1)),
    "DeepSeek-V3 rotates halves": ("deepseek_v3", dict(DEEPSEEK, rope_interleave=False, n_group=1, topk_group=1)),
    "DeepSeek-V2 never normalises": ("deepseek_v2", dict(DEEPSEEK, topk_method="greedy", norm_topk_prob=True)),
    "MiniMax says the part that it rotates": (
        "minimax_m2",
        dict(
            num_local_experts=5,
            num_experts_per_tok=2,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_the_tokens_of_transformers(tmp_path, name):
    model_type, fields = OPTIONS[name]
    folder = write(tmp_path, model_type, **fields)
    (found,) = generate(folder, ONE_RANK)
    assert [list(answer.token_ids) for answer in found] == expected_tokens(folder)


def edit(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


SILENT = {
    "bamba": dict(MAMBA, mamba_n_groups=1, attn_layer_indices=[1]),
    "cohere": dict(logit_scale=0.5),
    "gemma3_text": dict(TYPES, sliding_window=3, query_pre_attn_scalar=16),
    "glm4_moe": dict(
        n_routed_experts=6,
        n_shared_experts=1,
        moe_intermediate_size=36,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "minimax_m2": dict(num_local_experts=5, num_experts_per_tok=2),
    "mixtral": MOE_FAMILIES["mixtral"][1],
}


@pytest.mark.parametrize("model_type", SILENT)
def test_a_config_that_is_silent_about_rotation_means_transformers_default(tmp_path, model_type):
    folder = write(tmp_path, model_type, **SILENT[model_type])
    edit(folder, lambda config: config.pop("rope_parameters"))
    (found,) = generate(folder, ONE_RANK)
    assert [list(answer.token_ids) for answer in found] == expected_tokens(folder)


@pytest.mark.parametrize(("model_type", "field"), [("starcoder2", "hidden_act"), ("gemma2", "query_pre_attn_scalar")])
def test_a_config_that_is_silent_about_a_field_means_transformers_default(tmp_path, model_type, field):
    folder = write(tmp_path, model_type)
    edit(folder, lambda config: config.pop(field))
    (found,) = generate(folder, ONE_RANK)
    assert [list(answer.token_ids) for answer in found] == expected_tokens(folder)


def test_what_a_published_gemma_3_leaves_out_of_its_text_config_has_transformers_defaults(tmp_path):
    written = ("hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "sliding_window", "vocab_size")

    def as_published(config):
        text = {name: config["text_config"][name] for name in written}
        config["text_config"] = text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}

    defaults = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256)
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    folder = write(
        tmp_path, "gemma3", vision=dict(vision, image_size=28, patch_size=14), **defaults, sliding_window=3, **TYPES
    )
    edit(folder, as_published)
    (found,) = generate(folder, ONE_RANK)
    assert [list(answer.token_ids) for answer in found] == expected_tokens(folder)


@pytest.mark.parametrize("published", [True, False])
def test_stacked_experts_of_qwen3_vl_lie_either_way(tmp_path, published):
    folder = write(tmp_path, "qwen3_moe", **QWEN3_MOE)
    expected, file = expected_tokens(folder), folder / "model.safetensors"
    tensors = {name.replace("model.", "model.language_model."): tensor for name, tensor in load_file(file).items()}
    for layer in (0, 2):
        base = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{base}.{i}.{part}_proj.weight") for i in range(QWEN3_MOE["num_experts"])])
            for part in ("gate", "up", "down")
        )
        for name, rows in (("gate_up_proj", torch.cat((gate, up), 1)), ("down_proj", down)):
            tensors[f"{base}.{name}"] = rows.transpose(1, 2).contiguous() if published else rows
    save_file(tensors, file)
    edit(folder, lambda config: config.pop("norm_topk_prob"))
    edit(folder, lambda config: config.update(architectures=["Qwen3VLMoeForConditionalGeneration"]))
    (found,) = generate(folder, ONE_RANK)
    assert [list(answer.token_ids) for answer in found] == expected


def test_an_encoder_with_gemmas_name_is_refused(tmp_path):
    folder = write(tmp_path, "gemma3_text", use_bidirectional_attention=True, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="use_bidirectional_attention is true, expected false"):
        generate(folder, ONE_RANK)


def test_a_head_that_the_files_hold_counts_before_a_flag_that_ties_it(tmp_path):
    folder = write(tmp_path, "llama", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.randn(VOCAB, 48)}, file)
    (note,) = (n for n in plan(folder).warnings if "ties" in n)
    assert note == "the config ties lm_head to the embedding, but the checkpoint has both: both count"
    (found,) = generate(folder, ONE_RANK)
    assert [list(answer.token_ids) for answer in found] == expected_tokens(folder)


def test_a_window_in_one_block_of_a_searched_architecture_is_refused():
    block = {"attention": {"n_heads_in_group": 2, "window_length": 64}, "ffn": {"ffn_mult": 2.0}}
    config = dict(hidden_size=96, num_hidden_layers=1, num_attention_heads=6, vocab_size=VOCAB, block_configs=[block])
    with pytest.raises(ConfigError, match="block_configs.attention.window_length is 64, expected null"):
        plan(config | {"architectures": ["DeciLMForCausalLM"]})
