"""Tokens that travel to the ranks of their experts: how often the ranks meet for it, and that all comes home."""

import pytest
import torch

from shardwise.comm.rank import current_groups
from shardwise.ops.moe.exchange import dispatch_and_combine
from shardwise.testing import run_threads

HIDDEN, TOP_K, TOKENS = 6, 2, (5, 0, 3)
"""Rows of 12 bytes of bfloat16, 16 of ids, 8 of weights; a rank without tokens among the others."""


def drawn(rank: int):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS[rank], HIDDEN, generator=generator).bfloat16()
    ids = torch.randint(0, 6, (TOKENS[rank], TOP_K), generator=generator)
    return x, ids, torch.rand(TOKENS[rank], TOP_K, generator=generator)


def experts(x, ids, weights, ranks):
    """Expert e of rank e // 2 multiplies by e + 1."""
    factors = weights * (ids + 1) * torch.isin(ids // 2, torch.tensor(ranks))
    return (x.float() * factors.sum(dim=1, keepdim=True)).bfloat16()


def travel(check: bool):
    group = current_groups().world
    group.check = check
    x, ids, weights = drawn(group.rank)
    seen = []

    def compute(there, chosen, factors):
        seen.append((there.dtype, chosen.dtype, factors.dtype, len(there)))
        return experts(there, chosen, factors, [group.rank])

    wanted = torch.stack([(ids // 2 == rank).any(dim=1) for rank in range(group.size)])
    begun, exchanged = group.sequence, count_exchanges(group)
    out = dispatch_and_combine(group, wanted, x, ids, weights, compute)
    return out, seen, group.sequence - begun, len(exchanged)


def count_exchanges(group) -> list:
    found, exchange = [], group._exchange

    def counted(blob):
        found.append(blob)
        return exchange(blob)

    group._exchange = counted
    return found


@pytest.fixture(scope="module")
def results():
    return run_threads(3, travel, False)


def test_every_token_gets_the_sum_over_all_its_experts(results):
    for rank, (out, *_) in enumerate(results):
        x, ids, weights = drawn(rank)
        parts = torch.stack([experts(x, ids, weights, [owner]) for owner in range(3)])
        assert torch.equal(out, parts.float().sum(0).bfloat16()), "added in rank order, in float32"


def test_rows_travel_once_with_their_ids_and_weights_in_three_collectives(results):
    for rank, (_, seen, collectives, exchanges) in enumerate(results):
        here = sum(int((drawn(other)[1] // 2 == rank).any(dim=1).sum()) for other in range(3))
        assert seen == [(torch.bfloat16, torch.int64, torch.float32, here)]
        assert collectives == 3
        assert exchanges == 0, "sizes that both sides know pass through no control message"


def test_check_mode_compares_the_sizes_too():
    for rank, (out, _, collectives, exchanges) in enumerate(run_threads(3, travel, True)):
        assert out.shape == (TOKENS[rank], HIDDEN)
        assert collectives == 3
        assert exchanges == 6, "a call's text and its sizes"
