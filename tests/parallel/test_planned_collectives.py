"""The collectives that the planner lists are those that a forward pass makes."""

from collections import Counter
from math import prod

import pytest
from tiny import VOCAB

from shardwise.comm.rank import current_groups
from shardwise.comm.watch import FLIGHT
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.partition import extent
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

TOKENS = 5
ITEMSIZES = {"float32": 4, "uint8": 1, "int64": 0}
"""Tokens travel to their experts as bytes, with ids and weights beside them; counts are planned as no bytes a token."""
TOP_K = 2
LAYOUTS = [
    ("llama", ParallelLayout(tp=2)),
    ("gemma2", ParallelLayout(tp=2)),
    ("olmo2", ParallelLayout(tp=2)),
    ("cohere", ParallelLayout(tp=2)),
    ("deepseek_v3", ParallelLayout(tp=2)),
    ("bamba", ParallelLayout(tp=2)),
    ("bamba", ParallelLayout(tp=4)),
    ("nemotron_h", ParallelLayout(tp=2)),
    ("qwen2_moe", ParallelLayout(tp=2)),
    ("gpt_oss", ParallelLayout(tp=2, moe_ep=2)),
    ("glm4_moe", ParallelLayout(tp=2, attn_dp=2, moe_ep=4)),
    ("glm4_moe", ParallelLayout(tp=2, attn_dp=2, moe_ep=2)),
    ("mixtral", ParallelLayout(tp=1, attn_dp=2, moe_ep=2)),
]


def one_pass(folder, made):
    """Rank 0's collectives of a prompt in each data-parallel group; drawn tokens need all logits."""
    params = SamplingParams(max_new_tokens=1, temperature=1.0, seed=0, ignore_eos=True)

    def body():
        engine, world = Engine(folder, made, current_groups()), current_groups().world
        world.barrier()
        engine.generate([list(range(1, TOKENS + 1))] * made.layout.attn_dp, params)
        world.barrier()

    FLIGHT.ring.clear()
    run_threads(made.layout.world, body, layout=made.layout)
    rows = [row for row in FLIGHT.rows() if row["rank"] == 0]
    first, last = [i for i, row in enumerate(rows) if row["op"] == "barrier"][-2:]
    return rows[first + 1 : last]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_a_pass_makes_the_collectives_that_are_planned(checkpoint_of, name, layout):
    made = plan(checkpoint_of(name)[0], layout)
    rows = [row for row in one_pass(checkpoint_of(name)[0], made) if row["op"] != "all_gather_object"]
    planned = Counter()
    for each in made.collectives:
        planned[each.op, row_bytes(each, layout)] += each.count
    assert Counter((row["op"], prod(row["shape"][-1:]) * ITEMSIZES[row["dtype"]]) for row in rows) == planned


def row_bytes(planned, layout) -> int:
    """Of a row that rank 0 hands to a planned collective."""
    if planned.where == "head":  # planned: the row of all ranks
        return planned.bytes_per_token // VOCAB * extent(VOCAB, layout.tp, 0)[1]
    if planned.op == "all_to_all":  # planned: a token's copies to its experts' ranks, of this rank's share of tokens
        return planned.bytes_per_token * layout.tp // min(TOP_K, layout.moe_ep)
    return planned.bytes_per_token
