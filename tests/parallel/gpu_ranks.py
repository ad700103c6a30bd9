"""What each rank of a GPU test runs, as processes started by `run_processes`."""

import torch

from shardwise.comm.bootstrap import FolderStore
from shardwise.comm.rank import use_groups
from shardwise.comm.strategy import create, make_groups
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan


def generate(info, store, cases):
    """Tokens and decode path of each case, or the error's text in their place.

    case: (transport, folder, layout's sizes, engine options, prompts, new tokens)
    """
    torch.cuda.set_device(info.local_rank)
    groups = {}
    found = []
    for transport, folder, sizes, options, prompts, count in cases:
        if transport not in groups:
            place = store and FolderStore(store.folder / transport)
            groups[transport] = create(info, transport=transport, device="cuda", store=place)
        layout = ParallelLayout(**sizes)
        try:
            found.append(_tokens(info, groups[transport], folder, layout, options, prompts, count))
        except ValueError as error:  # the same on all ranks: the next case can run
            found.append(str(error))
    return found


def _tokens(info, world, folder, layout, options, prompts, count):
    made = make_groups(world, layout)
    device = f"cuda:{info.local_rank}"
    with use_groups(made):
        engine = Engine(folder, plan(folder, layout), made, device=device, **options)
        params = SamplingParams(max_new_tokens=count, ignore_eos=True)
        together = [list(each.token_ids) for each in engine.generate(prompts, params)]
        alone = [list(engine.generate([prompt], params)[0].token_ids) for prompt in prompts]
        return together, alone, engine.stats().decode
