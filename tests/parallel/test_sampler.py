import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from shardwise.parallel.sampler import SamplingParams, sample

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -5.0])


def counts(params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(LOGITS, params, generator) for _ in range(draws)])
    return torch.bincount(drawn, minlength=5) / draws


def test_temperature_0_is_the_largest_logit():
    assert sample(LOGITS, SamplingParams(), None) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature):
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(counts(SamplingParams(temperature=temperature)), expected, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_most_likely():
    expected = torch.tensor([0.0, 3.0, 2.0, 0.0, 0.0]).exp()
    expected[[0, 3, 4]] = 0
    measured = counts(SamplingParams(temperature=1.0, top_k=2))
    torch.testing.assert_close(measured, expected / expected.sum(), atol=0.03, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    chances = LOGITS.softmax(0)  # 0.64, 0.24, 0.09, ... in falling order of tokens 1, 2, 0
    measured = counts(SamplingParams(temperature=1.0, top_p=0.7))
    assert measured[[0, 3, 4]].sum() == 0
    assert measured[1] == pytest.approx(float(chances[1] / (chances[1] + chances[2])), abs=0.03)
    assert counts(SamplingParams(temperature=1.0, top_p=0.5))[1] == 1


def test_a_seed_fixes_the_draws():
    params = SamplingParams(temperature=1.0, seed=5)
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(params.seed)
        runs.append([sample(LOGITS, params, generator) for _ in range(50)])
    assert runs[0] == runs[1]


def test_more_candidates_than_tokens_are_all_of_them():
    assert sample(LOGITS, SamplingParams(temperature=1.0, top_k=10**8), torch.Generator().manual_seed(0)) in range(5)


@pytest.mark.parametrize("temperature", [1e-30, 1e-320])
def test_a_temperature_near_0_is_the_largest_logit(temperature):
    assert sample(LOGITS, SamplingParams(temperature=temperature), torch.Generator().manual_seed(0)) == 1


@pytest.mark.timeout(60)
def test_numbers_of_numpy_become_plain_ones_and_are_checked_alike():
    given = dict(
        max_new_tokens=np.int64(4), temperature=np.float32(0.5), seed=np.uint64(3), stop_token_ids=np.arange(2)
    )
    params = SamplingParams(**given)
    assert params == SamplingParams(max_new_tokens=4, temperature=0.5, seed=3, stop_token_ids=(0, 1))
    assert json.loads(json.dumps(asdict(params)))["seed"] == 3
    with pytest.raises(ValueError, match="top_k is -1, legal: a whole number of at least 0"):
        SamplingParams(top_k=np.int32(-1))


def test_one_stop_text_is_a_list_of_one():
    assert SamplingParams(stop="end") == SamplingParams(stop=["end"])
