"""Experts chosen in one launch are those of the layer's own routing, and weigh as much."""

import pytest
import torch

from shardwise.ops.moe.choice import Choice, choose_experts
from shardwise.ops.triton_support import interpreting
from shardwise.parallel.routing import route
from shardwise.sharding.spec import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)
CASES = {
    "DeepSeek-V2-Lite": (64, Routing(top_k=6, normalize=False), False),
    "DeepSeek-V2": (160, Routing(top_k=6, normalize=False, groups=8, top_groups=3, scale=16.0), False),
    "DeepSeek-V3": (
        256,
        Routing(
            top_k=8, score="sigmoid", groups=8, top_groups=4, group_score="top2_sum", scale=2.5, bias_correction=True
        ),
        True,
    ),
    "one group": (6, Routing(top_k=2, score="sigmoid", bias_correction=True), True),
}


@pytest.mark.parametrize("name", CASES)
def test_choice_and_weights_are_those_of_the_routing(name):
    torch.manual_seed(0)
    experts, routing, corrected = CASES[name]
    logits = torch.randn(9, experts, device=DEVICE)
    correction = torch.randn(experts, device=DEVICE) * 0.3 if corrected else None
    slots = torch.where(torch.rand(experts, device=DEVICE) < 0.7, torch.arange(experts, device=DEVICE), -1)
    ids, weights = route(logits, routing, correction)
    choice = Choice(
        routing.top_k,
        routing.score,
        routing.normalize,
        routing.groups,
        routing.top_groups,
        routing.group_score == "top2_sum",
        routing.scale,
    )
    found, found_weights = choose_experts(logits, slots, choice, correction)
    assert torch.equal(found.long(), slots[ids])
    torch.testing.assert_close(found_weights, weights, atol=1e-6, rtol=1e-5)


def test_equal_logits_choose_the_lowest_numbers():
    slots = torch.arange(6, device=DEVICE)
    ids, weights = choose_experts(torch.zeros(2, 6, device=DEVICE), slots, Choice(3))
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3, device=DEVICE))


def test_groups_that_are_not_even_are_refused():
    with pytest.raises(ValueError, match="6 experts in 4 groups by softmax; legal: up to 1024, in even groups"):
        choose_experts(torch.zeros(1, 6), torch.arange(6), Choice(2, groups=4, top_groups=1))
