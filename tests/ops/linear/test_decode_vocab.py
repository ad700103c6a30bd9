"""Both ends of the decode step: embedding rows with the page table, and the greedy token over several ranks."""

import pytest
import torch

from shardwise.ops.linear.vocab import BEST_BLOCK, GreedyChoice, embed
from shardwise.ops.triton_support import interpreting
from shardwise.partition import extent

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not (interpreting() or DEVICE.type == "cuda"), reason="needs Triton's interpreter or a GPU"
)


def inputs(*rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def test_tokens_come_from_the_host_or_from_the_last_step_and_pages_enter_the_tables():
    weight = torch.randn(50, 40, device=DEVICE)
    last = torch.tensor([9, 44, 3], dtype=torch.int32, device=DEVICE)
    tables = torch.zeros(2, 3, 4, dtype=torch.int32, device=DEVICE)
    step = inputs([7, 0, 0], [-1, 2, 0], [17, 130, -1], [2, 0, 1], [5, 6, 8], [9, 4, 3])
    got = embed(step, last, tables, weight, first=0, page_size=64, multiplier=2.0)
    assert torch.equal(got, 2 * weight[[7, 3, 9]])
    assert tables.tolist() == [[[0, 0, 6, 0], [0, 0, 0, 0], [5, 0, 0, 0]], [[0, 0, 4, 0], [0, 0, 0, 0], [9, 0, 0, 0]]]


def test_ranks_look_up_their_own_tokens():
    weight = torch.randn(50, 40, device=DEVICE)
    tables, last = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in ((1, 3, 1), (1,)))
    step = inputs([7, 30, 49], [-1] * 3, [-1] * 3, [0] * 3, [0] * 3)
    parts = [
        embed(step, last, tables, weight[slice(*extent(50, 3, r))], first=extent(50, 3, r)[0], page_size=64)
        for r in range(3)
    ]
    assert torch.equal(sum(parts), weight[[7, 30, 49]])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("vocab", [11, 2 * BEST_BLOCK + 100])
def test_the_greedy_token_is_the_first_of_the_largest_logits(ranks, vocab):
    torch.manual_seed(0)
    batch, padded = 4, vocab + 2  # two columns behind the last rank's are not tokens
    logits = torch.randn(batch, padded, device=DEVICE)
    logits[:, vocab:] = 100.0
    logits[1, [3, vocab - 1]] = 50.0
    logits[2] = -torch.inf
    logits[2, vocab // 2] = -5.0
    expected = logits[:, :vocab].argmax(-1)
    expected[1] = 3
    choices, parts = [], []
    for rank in range(ranks):
        first, stop = extent(padded, ranks, rank)
        choice = GreedyChoice(
            most=8, columns=stop - first, first=first, limit=min(stop, vocab) - first, rank=rank, ranks=ranks,
            device=DEVICE,
        )  # fmt: skip
        tokens = torch.full((8,), -1, dtype=torch.int32, device=DEVICE)
        for _ in range(2):  # the counters are back at zero
            pairs = choice.local(logits[:, first:stop].contiguous(), tokens)
        choices.append(choice)
        parts.append(pairs)
    if ranks > 1:
        choices[0].winner(sum(parts), tokens)
    assert tokens[:batch].tolist() == expected.tolist() and tokens[batch:].eq(-1).all()
