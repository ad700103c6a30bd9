import torch

from shardwise.parallel.routing import route
from shardwise.sharding.spec import Routing

LOGITS = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5, 3.0]])


def routed(correction=None, **fields) -> dict[int, float]:
    ids, weights = route(LOGITS, Routing(**{"top_k": 2, **fields}), correction)
    return dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))


def close(measured: dict[int, float], expected: dict[int, float]) -> bool:
    return measured.keys() == expected.keys() and all(abs(measured[i] - expected[i]) < 1e-6 for i in expected)


def test_softmax_over_all_without_and_with_normalisation():
    chances = LOGITS[0].softmax(0)
    assert close(routed(normalize=False), {5: float(chances[5]), 1: float(chances[1])})
    total = float(chances[5] + chances[1])
    assert close(routed(), {5: float(chances[5]) / total, 1: float(chances[1]) / total})


def test_softmax_behind_the_choice_equals_the_normalised_one():
    assert close(routed(softmax_after_topk=True), routed())


def test_scale_multiplies_the_weights():
    assert close(routed(scale=2.5), {expert: 2.5 * weight for expert, weight in routed().items()})


def test_a_correction_changes_the_choice_but_not_the_weights():
    correction = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0])
    scores = LOGITS[0].sigmoid()
    chosen = routed(correction, score="sigmoid", normalize=False)
    assert close(chosen, {2: float(scores[2]), 5: float(scores[5])})


def test_the_choice_is_limited_to_the_best_groups():
    # Groups (0, 1), (2, 3), (4, 5): by the maximum the best are the third and the first; by the sum of two as well.
    for score in ("max", "top2_sum"):
        assert routed(groups=3, top_groups=1, group_score=score).keys() == {5, 4}
        assert routed(groups=3, top_groups=2, group_score=score).keys() == {5, 1}


def test_group_scores_differ_where_a_group_has_one_good_expert():
    logits = torch.tensor([[5.0, -9.0, 4.0, 3.9]])
    by_max, _ = route(logits, Routing(top_k=1, score="sigmoid", groups=2, top_groups=1))
    by_sum, _ = route(logits, Routing(top_k=1, score="sigmoid", groups=2, top_groups=1, group_score="top2_sum"))
    assert (by_max.item(), by_sum.item()) == (0, 2)
