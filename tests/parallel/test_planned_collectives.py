"""The collectives that the planner lists are those that a forward pass makes."""

from collections import Counter
from math import prod

import pytest

from shardwise.comm.rank import current_groups
from shardwise.comm.watch import FLIGHT
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

TOKENS = 5
SENT = ("float32", "uint8")
"""Types of activations on their way: tokens travel to their experts as bytes, with ids and weights beside them."""
LAYOUTS = [
    ("llama", ParallelLayout(tp=2)),
    ("gemma2", ParallelLayout(tp=2)),
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
    rows = one_pass(checkpoint_of(name)[0], made)
    activations = [row for row in rows if row["dtype"] in SENT and prod(row["shape"]) > TOKENS * layout.attn_dp]
    planned = Counter({op: 0 for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")})
    for each in made.collectives:
        planned[each.op] += each.count
    assert Counter(row["op"] for row in activations) == +planned
    sums = {row["shape"][-1] * 4 for row in activations if row["op"] == "all_reduce"}
    assert sums <= {each.bytes_per_token for each in made.collectives if each.op == "all_reduce"}
