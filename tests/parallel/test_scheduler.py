"""The scheduler by itself: what it does when the cache is nearly full."""

import torch

from shardwise.parallel.cache import LayerShape
from shardwise.parallel.paged import PagedCache
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.scheduler import Request, Scheduler
from shardwise.parallel.text import TextStream

CPU = torch.device("cpu")


def request(number: int, prompt: int, new: int) -> Request:
    return Request(number, [1] * prompt, SamplingParams(max_new_tokens=new), TextStream(str))


def test_a_prompt_waits_for_room_for_all_of_it_and_is_read_once():
    cache = PagedCache([LayerShape(1, 8, 8)], pages=10, slots=4, max_length=160, dtype=torch.float32, device=CPU)
    scheduler = Scheduler(cache=cache, step_tokens=32, max_length=160, device=CPU)
    running, long = request(0, 30, 20), request(1, 140, 4)  # 2 and 9 of the 10 pages, 4 and 9 with their answers
    unfinished, read = [running, long], {running.number: 0, long.number: 0}
    scheduler.add(unfinished)
    while unfinished:
        before = {each: each.cached for each in unfinished}
        step = scheduler.next_step()
        for each in unfinished:
            lost = each.cached < before[each]  # it gave way to another, and began again
            read[each.number] += each.cached - (0 if lost else before[each])
        for each in step.sampled:
            each.tokens.append(1)
            if len(each.tokens) == each.params.max_new_tokens:
                unfinished.remove(each)
                scheduler.finish(each)
    assert read == {0: 30 + 19, 1: 140 + 3}
