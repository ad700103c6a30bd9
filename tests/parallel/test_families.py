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
LAYOUTS = [ParallelLayout(tp=n) for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A checkpoint with Transformers' tokens."""
    model_type, fields = FAMILIES[request.param]
    folder = write(tmp_path_factory.mktemp("model"), model_type, **fields)
    return folder, expected_tokens(folder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_greedy_tokens_equal_transformers(family, layout):
    folder, expected = family
    for completions in generate(folder, layout):
        assert [list(c.token_ids) for c in completions] == expected
