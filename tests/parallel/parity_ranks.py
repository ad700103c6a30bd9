"""A rank's body: greedy tokens of several checkpoints, each under several layouts, over one transport."""

from shardwise.comm.bootstrap import FolderStore
from shardwise.comm.rank import use_groups
from shardwise.comm.strategy import create, make_groups
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan


def generate(info, store: FolderStore | None, transport: str, cases: list, prompts: list, count: int) -> list:
    """cases: (folder, sizes of a layout of the whole world). One list of answers a case."""
    world = create(info, transport=transport, store=store)
    assert world.transport == transport
    answers = []
    for folder, sizes in cases:
        layout = ParallelLayout(**sizes)
        groups = make_groups(world, layout)
        with use_groups(groups):
            engine = Engine(folder, plan(folder, layout), groups)
            done = engine.generate(prompts, SamplingParams(max_new_tokens=count))
        answers.append([list(each.token_ids) for each in done])
    world.close()
    return answers
