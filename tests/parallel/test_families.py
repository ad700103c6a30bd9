"""Token equality with Transformers on tiny random checkpoints, family by family and layout by layout."""

from functools import cache

import pytest
from families import FAMILIES, MOE_FAMILIES, NEAR_KIN
from tiny import NEW_TOKENS, PROMPTS, generate

from shardwise.comm.rank import current_groups
from shardwise.comm.watch import FLIGHT
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_processes, run_threads

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
CASES += [(name, ParallelLayout(tp=n)) for name in NEAR_KIN for n in (1, 2)]
CASES += [("deepseek_v3", ParallelLayout(tp=2, attn_dp=2, moe_ep=4))]
QWEN_LAYOUTS = [ParallelLayout(tp=4), ParallelLayout(tp=2, moe_ep=2), ParallelLayout(tp=1, attn_dp=4, moe_ep=2)]
"""More ranks than key heads of the delta rule; experts placed; a group without tokens."""
CASES += [("qwen3_next", layout) for layout in QWEN_LAYOUTS]
CASES += [("olmo2", ParallelLayout(tp=4))]  # norms over heads of which some are on two ranks
CASES += [("bamba", ParallelLayout(tp=4)), ("nemotron_h", ParallelLayout(tp=3))]  # more ranks than groups of heads
CASES += [("nemotron_h with experts", ParallelLayout(tp=1, attn_dp=4, moe_ep=n)) for n in (2, 4)]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_greedy_tokens_equal_transformers(checkpoint_of, parity, name, layout):
    folder, expected = checkpoint_of(name)
    parity(name, layout, "threads")
    for completions in generate(folder, layout):
        assert [list(c.token_ids) for c in completions] == expected


@pytest.mark.parametrize(
    ("layout", "used", "unused"),
    [
        (ParallelLayout(tp=2, attn_dp=2, moe_ep=4), "all_to_all", "reduce_scatter"),
        (ParallelLayout(tp=1, attn_dp=4, moe_ep=2), "reduce_scatter", "all_to_all"),
    ],
    ids=str,
)
def test_whole_experts_are_sent_their_tokens_and_cut_ones_gather_them_as_planned(checkpoint_of, layout, used, unused):
    folder, _ = checkpoint_of("mixtral")
    FLIGHT.ring.clear()
    generate(folder, layout)
    seen, planned = {row["op"] for row in FLIGHT.rows()}, {each.op for each in plan(folder, layout).collectives}
    assert used in seen & planned and unused not in seen | planned


def test_a_plan_may_place_whole_experts_in_any_order(checkpoint_of):
    folder, expected = checkpoint_of("mixtral")
    layout = ParallelLayout(tp=1, attn_dp=2, moe_ep=2)
    made = plan(folder, layout, expert_placement=((4, 1), (0, 2, 3)))
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    ranks = run_threads(2, lambda: Engine(folder, made, current_groups()).generate(PROMPTS, params), layout=layout)
    assert all([list(c.token_ids) for c in completions] == expected for completions in ranks)


SIZES = {"dense": [dict(tp=2)], "moe": [dict(tp=2), dict(tp=2, moe_ep=2), dict(tp=1, attn_dp=2, moe_ep=2)]}


@pytest.fixture(scope="module")
def in_processes(checkpoint_of):
    """Every family and layout on two ranks, one job a transport: (family, layout) -> the ranks' answers."""

    @cache
    def run(transport: str) -> dict[tuple[str, str], list]:
        cases = [(name, sizes) for name in FAMILIES for sizes in SIZES["moe" if name in MOE_FAMILIES else "dense"]]
        folders = [(str(checkpoint_of(name)[0]), sizes) for name, sizes in cases]
        ranks = run_processes(
            2, "parity_ranks:generate", transport, folders, PROMPTS, NEW_TOKENS, mpi=transport == "mpi"
        )
        return {
            (name, str(ParallelLayout(**sizes))): answers for (name, sizes), *answers in zip(cases, *ranks, strict=True)
        }

    return run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("transport", ["shm", "gloo", "mpi"])
def test_every_transport_gives_the_same_tokens(checkpoint_of, in_processes, parity, transport, name):
    found = {layout: answers for (family, layout), answers in in_processes(transport).items() if family == name}
    for layout in found:
        parity(name, layout, transport)
    assert found and all(answer == checkpoint_of(name)[1] for answers in found.values() for answer in answers)
