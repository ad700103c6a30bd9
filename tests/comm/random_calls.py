"""Random sequences of all collectives on several groups of the same ranks, some of which dawdle; exact results.

Every rank draws the same sequence from `seed`, and its own delays beside it. Values are small integers: their sums are
exact in every dtype and every order.
"""

import random
import time

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SUMMABLE = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8)
MOVABLE = (*SUMMABLE, torch.uint8, torch.bool)
COUNTS = (0, 1, 7, 500, 3000, 50_000, 140_000, 600_000)
LIKELY = (1, 1, 2, 6, 6, 2, 1, 1)
STRATEGIES = ("AUTO", "AUTO", "AUTO", "ONESHOT", "TWOSHOT", "MIN_LATENCY", "NCCL")


class Calls:
    """One rank's end. `groups`: its own, in an order that all ranks share."""

    def __init__(self, groups, seed: int, dawdle: float = 0.05):
        self.groups, self.seed, self.dawdle = groups, seed, dawdle
        self.own = random.Random(f"{seed} {groups[0].rank}")
        self.accumulators = [[g.accumulator(torch.zeros(n)) for n in (48, 70_000)] for g in groups]
        self.done: dict[str, int] = {}

    def run(self, calls: int) -> dict[str, int]:
        """Make so many calls; how many of each kind were made."""
        for number in range(calls):
            self.plan = random.Random(f"{self.seed}, call {number}")  # parts of other sizes draw other numbers of times
            place, kind = self.plan.randrange(len(self.groups)), self.plan.choice(KINDS)
            if self.own.random() < self.dawdle:
                time.sleep(self.own.random() ** 4 * 0.02)
            try:
                getattr(self, f"call_{kind}")(self.groups[place], place)
            except AssertionError as error:
                raise AssertionError(f"{kind} on {self.groups[place]!r} after {self.done}: {error}") from error
            self.done[kind] = self.done.get(kind, 0) + 1
        return self.done

    def drawn(self, group, shapes, dtype) -> list[torch.Tensor]:
        """All ranks' tensors, of a shape each."""
        step, shift = self.plan.randrange(1, 16), self.plan.randrange(100)
        tensors = []
        for rank, shape in enumerate(shapes):
            n = torch.Size(shape).numel()
            values = (torch.arange(n) * step + shift * (group.ranks[rank] + 1)) % 7 - 3 * dtype.is_signed
            tensors.append((values > 2 if dtype == torch.bool else values).to(dtype).view(shape))
        return tensors

    def count(self) -> int:
        return self.plan.choices(COUNTS, LIKELY)[0]

    def shape(self) -> tuple[int, ...]:
        n = self.count()
        return self.plan.choice(((n,), (n // 3, 3), (2, n // 8, 4)))

    def sizes(self, group, total: int) -> list[int]:
        """Lengths that add up to `total`, some of them 0."""
        cuts = sorted(self.plan.choice((0, total, self.plan.randint(0, total))) for _ in range(group.size - 1))
        return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]

    def call_all_reduce(self, group, place):
        shape, dtype = self.shape(), self.plan.choice(SUMMABLE)
        strategy, how = self.plan.choice(STRATEGIES), self.plan.choice(("new", "in place", "out", "turned", "gaps"))
        inputs = self.drawn(group, [shape] * group.size, dtype)
        mine, total = inputs[group.rank], sum(inputs[1:], inputs[0].clone())
        if how == "in place":
            found = group.all_reduce(mine, out=mine, strategy=strategy)
        elif how == "out":
            found = group.all_reduce(mine, out=torch.empty_like(mine), strategy=strategy)
        elif how == "turned":
            found, total = group.all_reduce(mine.transpose(0, -1), strategy=strategy), total.transpose(0, -1)
        elif how == "gaps":
            found = torch.empty(*shape, 2, dtype=dtype)[..., 0]
            group.all_reduce(mine, out=found, strategy=strategy)
        else:
            found = group.all_reduce(mine, strategy=strategy)
        assert torch.equal(found, total), (shape, dtype, strategy, how)

    def call_small_sum(self, group, place):
        """As in a decode step: the same few shapes again and again."""
        inputs = self.drawn(group, [self.plan.choice(((64,), (2, 33)))] * group.size, torch.float32)
        out = torch.empty_like(inputs[0])
        group.all_reduce(inputs[group.rank], out=out)
        assert torch.equal(out, sum(inputs[1:], inputs[0].clone()))

    def call_accumulate(self, group, place):
        accumulator = self.plan.choice(self.accumulators[place])
        inputs = self.drawn(group, [accumulator.total.shape] * group.size, torch.float32)
        accumulator.total.zero_()
        for turn in range(1, 3):
            accumulator.term().copy_(inputs[group.rank])
            accumulator.add()
            assert torch.equal(accumulator.total, turn * sum(inputs[1:], inputs[0].clone())), turn

    def call_all_gather(self, group, place):
        shape, dtype = list(self.shape()), self.plan.choice(MOVABLE)
        dim = self.plan.randrange(len(shape))
        sizes = self.sizes(group, shape[dim]) if self.plan.random() < 0.5 else [shape[dim]] * group.size
        inputs = self.drawn(group, [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes], dtype)
        given = None if len(set(sizes)) == 1 and self.plan.random() < 0.5 else sizes
        found = group.all_gather(inputs[group.rank], dim, given)
        assert torch.equal(found, torch.cat(inputs, dim)), (shape, dtype, dim, sizes)

    def call_reduce_scatter(self, group, place):
        shape, dtype = self.shape(), self.plan.choice(SUMMABLE)
        dim = self.plan.randrange(len(shape))
        sizes = self.sizes(group, shape[dim]) if self.plan.random() < 0.5 else None
        inputs = self.drawn(group, [shape] * group.size, dtype)
        total = sum(inputs[1:], inputs[0].clone())
        found = group.reduce_scatter(inputs[group.rank], dim, sizes)
        expected = total.split(sizes, dim) if sizes else total.tensor_split(group.size, dim)
        assert torch.equal(found, expected[group.rank]), (shape, dtype, dim, sizes)

    def call_all_to_all(self, group, place):
        rows, width, dtype = self.count() // 8 // group.size, self.plan.choice((1, 8)), self.plan.choice(MOVABLE)
        table = [self.sizes(group, rows) for _ in range(group.size)]
        how = self.plan.choice(("equal", "sends", "both"))
        if how == "equal":
            table = [[rows] * group.size] * group.size
        inputs = self.drawn(group, [(sum(row), width) for row in table], dtype)
        parts = [x.split(row)[group.rank] for x, row in zip(inputs, table, strict=True)]
        sends, receives = table[group.rank], [row[group.rank] for row in table]
        known = {"equal": (), "sends": (sends,), "both": (sends, receives)}[how]
        assert torch.equal(group.all_to_all(inputs[group.rank], *known), torch.cat(parts)), (table, width, dtype, how)

    def call_broadcast(self, group, place):
        shape, dtype, root = self.shape(), self.plan.choice(MOVABLE), self.plan.randrange(group.size)
        inputs = self.drawn(group, [shape] * group.size, dtype)
        mine = inputs[group.rank].clone()
        turned = self.plan.random() < 0.3
        group.broadcast(mine.transpose(0, -1) if turned else mine, root)
        assert torch.equal(mine, inputs[root]), (shape, dtype, root, turned)

    def call_norm(self, group, place):
        rows, hidden, dtype = self.plan.randrange(40), self.plan.choice((33, 576)), self.plan.choice(FLOATS[1:])
        inputs = self.drawn(group, [(rows, hidden)] * group.size, dtype)
        residual, weight = torch.ones(rows, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)
        normed, total = group.all_reduce_residual_rms_norm(inputs[group.rank], residual, weight, 1e-6)
        assert torch.equal(total, sum(inputs[1:], inputs[0].clone()) + 1)
        assert torch.equal(normed, torch.nn.functional.rms_norm(total, (hidden,), weight, 1e-6))

    def call_object(self, group, place):
        length = self.plan.choice((0, 10, 300, 5000, 600_000))
        found = group.all_gather_object(("x" * length, group.rank))
        assert found == [("x" * length, rank) for rank in range(group.size)]

    def call_barrier(self, group, place):
        group.barrier()

    def call_split(self, group, place):
        """A part that lives for one call."""
        if self.plan.random() < 0.8:
            return
        colors = [self.plan.randrange(2) for _ in range(group.size)]
        keys = [self.plan.randrange(9) for _ in range(group.size)]
        part = (
            group.split_known(colors, keys)
            if self.plan.random() < 0.5
            else group.split(colors[group.rank], keys[group.rank])
        )
        assert part.all_reduce(torch.tensor([1.0])).item() == colors.count(colors[group.rank])
        part.close()


KINDS = [name.removeprefix("call_") for name in dir(Calls) if name.startswith("call_")]


def several(world) -> list:
    """The world, a part of every second rank, and the world the other way round."""
    return [world, world.split(world.rank % 2), world.split(0, key=-world.rank)]
