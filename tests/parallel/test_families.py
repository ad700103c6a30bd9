"""Token equality with Transformers on tiny random checkpoints, family by family and layout by layout."""

import pytest
from tiny import expected_tokens, generate, write

from shardwise.sharding.layout import ParallelLayout

FAMILIES = {
    "llama": ("llama", {}),
    "llama tied, biased, scaled rope": (
        "llama",
        dict(
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "mistral with a window": ("mistral", dict(sliding_window=5)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(attention_bias=False)),
}
MOE_FAMILIES = {
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=36,
            shared_expert_intermediate_size=40,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_moe with a dense layer": (
        "qwen3_moe",
        dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=36, norm_topk_prob=True, mlp_only_layers=[1]),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            seed=1,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}
FAMILIES |= MOE_FAMILIES
LAYOUTS = [ParallelLayout(tp=n) for n in (1, 2, 3, 4)]
MOE_LAYOUTS = [
    ParallelLayout(tp=2, moe_ep=2),
    ParallelLayout(tp=3, moe_ep=3),
    ParallelLayout(tp=4, moe_ep=4),
    ParallelLayout(tp=4, moe_ep=2),
]


DATA_PARALLEL_LAYOUTS = [
    ParallelLayout(tp=1, attn_dp=2, moe_ep=2),
    ParallelLayout(tp=2, attn_dp=2, moe_ep=4),
    ParallelLayout(tp=1, attn_dp=4, moe_ep=2),
]
"""With 3 prompts, one of four groups has none and takes part without tokens."""
CASES = [(name, layout) for name in FAMILIES for layout in LAYOUTS]
CASES += [(name, layout) for name in MOE_FAMILIES for layout in MOE_LAYOUTS + DATA_PARALLEL_LAYOUTS]
CASES += [("llama", ParallelLayout(tp=2, attn_dp=2))]


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """A checkpoint with Transformers' tokens."""
    model_type, fields = FAMILIES[request.param]
    folder = write(tmp_path_factory.mktemp("model"), model_type, **fields)
    return folder, expected_tokens(folder)


@pytest.mark.parametrize(("family", "layout"), CASES, indirect=["family"], ids=str)
def test_greedy_tokens_equal_transformers(family, layout):
    folder, expected = family
    for completions in generate(folder, layout):
        assert [list(c.token_ids) for c in completions] == expected
