"""Placements of experts that a caller gives: what does not fit is refused, by rank and expert."""

import pytest
from published_models import CONFIGS

from shardwise.sharding.plan import plan


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (((0, 1, 2, 3),), "experts are placed on 1 ranks, ep is 2"),
        (((0, 1, 2, 3), (4, 5, 6, 7), (0,)), "experts are placed on 3 ranks, ep is 2"),
        (((0, 1, 2, 3), (4, 5, 6, 7, 8)), "expert 8 is placed on ep rank 1, the model has 8 experts"),
        (((0, 1, 2, 3), (4, 5, 6)), "expert 7 is placed on no rank"),
        (((0, 1, 2, 3, 3), (4, 5, 6, 7)), r"ep rank 0 gets experts \(0, 1, 2, 3, 3\): .* each once"),
        (((), (0, 1, 2, 3, 4, 5, 6, 7)), r"ep rank 0 gets experts \(\): give it at least one"),
    ],
    ids=str,
)
def test_a_placement_of_experts_that_does_not_fit_is_refused(placement, words):
    config = CONFIGS["Qwen/Qwen3-30B-A3B"] | {"num_experts": 8, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=words):
        plan(config, tp=2, ep=2, expert_placement=placement)


def test_experts_of_one_tensor_are_placed_in_its_order():
    config, backwards = CONFIGS["openai/gpt-oss-20b"], (tuple(range(16)), tuple(range(31, 15, -1)))
    with pytest.raises(ValueError, match="ep rank 1 gets experts .* ascending, they are parts of one tensor"):
        plan(config, tp=2, ep=2, expert_placement=backwards)
    made = plan(config, tp=2, ep=2, expert_placement=tuple(tuple(sorted(held)) for held in backwards))
    assert made == plan(config, tp=2, ep=2)
