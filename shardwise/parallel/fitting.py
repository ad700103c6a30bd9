"""Whether a model fits the memory of its ranks, with the cache of a request: known before a weight is read."""

import socket
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import prod

import torch

from shardwise.comm.base import Communicator
from shardwise.parallel import block_groups, load_int4
from shardwise.parallel.grouped import grouped_weights
from shardwise.parallel.host_memory import DoesNotFit, host_memory
from shardwise.parallel.options import DEVICE_PAGE, HOST_PAGE
from shardwise.parallel.paged import pool_pages
from shardwise.parallel.sizing import RESERVED_BYTES, activation_bytes
from shardwise.parallel.weight_form import WeightForm, int4_experts, keeps_as_float8, moe_blocks
from shardwise.sharding.checkpoint.header import STORAGE
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.memory import cache_entries
from shardwise.sharding.plan import Plan, plan

GIB = 2**30
GROWTH = (2, 4, 8)
"""Times as many ranks that are looked at for room."""
SHOWN = 3
"""Ways out that an error names."""


@dataclass(frozen=True)
class Need:
    """Bytes that a rank takes at least when it serves a request."""

    weights: int
    cache: int
    states: int
    """Of the recurrent layers of all sequences."""
    work: int
    """Alive in a step, and on a GPU what libraries and graphs take."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.states + self.work


@dataclass(frozen=True, kw_only=True)
class Holding:
    """How ranks hold a model: what their bytes depend on beside the plan."""

    dtype: torch.dtype
    form: WeightForm
    device: str
    """cuda or cpu."""
    tokens: int
    """That the cache must hold."""
    sequences: int
    """That it is made for: layers with a window keep one for each, or all tokens where those are fewer. So do recurrent
    layers keep states, but a GPU takes as many sequences as there is room for, one at least."""
    step_tokens: int
    """Of the largest step."""

    @property
    def on_gpus(self) -> bool:
        return self.device == "cuda"

    @property
    def page(self) -> int:
        return DEVICE_PAGE if self.on_gpus else HOST_PAGE

    @property
    def stateful(self) -> int:
        """Sequences that must have room for their states."""
        return 1 if self.on_gpus else self.sequences

    def need(self, made: Plan, rank: int) -> Need:
        at = made.layout.coordinates(rank)
        spare = 0 if self.on_gpus else 1  # `StateCache` for PyTorch's operators
        entries = cache_entries(
            made.model, lambda axis: made.cuts.share(axis, at), self.dtype.itemsize, spare_inputs=spare
        )
        pages = -(-self.tokens // self.page)
        pools = (pool_pages(e.window, pages=pages, slots=self.sequences, page_size=self.page) for e in entries)
        step = self.step_tokens if self.on_gpus else min(self.step_tokens, pages * self.page)
        return Need(
            weights=weight_bytes(made, rank, self.dtype.itemsize, self.form),
            cache=sum(n * self.page * e.layers * e.token_bytes for n, e in zip(pools, entries, strict=True)),
            states=self.stateful * sum(e.layers * e.sequence_bytes for e in entries),
            work=activation_bytes(made.model, step, self.dtype)
            + (RESERVED_BYTES if self.on_gpus else 0)
            + widened_bytes(made, rank, self.dtype.itemsize, self.form),
        )

    def fits(self, made: Plan, free: int) -> bool:
        """On GPUs that have `free` bytes each, or on one host that has them for all ranks."""
        totals = [self.need(made, rank).total for rank in range(made.layout.world)]
        return (max(totals) if self.on_gpus else sum(totals)) <= free

    def most_tokens(self, made: Plan, free: int) -> int:
        """The largest cache that fits, up to the one that is wanted; 0 for none."""
        pages = range(1, self.tokens // self.page + 1)
        return self.page * bisect_left(
            pages, True, key=lambda n: not replace(self, tokens=n * self.page).fits(made, free)
        )


def weight_bytes(made: Plan, rank: int, itemsize: int, form: WeightForm) -> int:
    """What a rank's weights take: `itemsize` bytes a parameter, as stored where they stay in their form.

    A little less than they do take (a table of blocks that is also the head is held in two forms; scales of float8
    weights, and those of which a cut goes through tiles, are more than they count), but for biases that one rank adds
    for all, which are counted for each.
    """
    if form.keeps_int4:
        grouped, held_bytes = load_int4.held_forms(made, rank), load_int4.held_bytes
    else:
        grouped, held_bytes = grouped_weights(made.model) if form.native_blocks else {}, block_groups.held_bytes
    held, at = 0, made.layout.coordinates(rank)
    for pattern in made.loaded:
        shard, count = made.pattern_shard(pattern, rank), made.pattern_count(pattern, rank)
        block, stays = STORAGE[shard.dtype][0], form.packs_mxfp4 and shard.dtype == "U8"
        if form.keeps_float8 and keeps_as_float8(pattern.spec):
            stays = True
        if stays or (form.native_blocks and block > 1):
            held += count * shard.nbytes
        else:
            values = made.cuts.values(pattern.spec, at) if pattern.spec.values else ()
            plain = prod(length for _, length in values) * itemsize if values else 0
            kept = held_bytes(grouped[pattern.spec], pattern.spec, values) if pattern.spec in grouped else 0
            held += count * (kept or plain)
    return held


def widened_bytes(made: Plan, rank: int, itemsize: int, form: WeightForm) -> int:
    """At most what one layer's float8 or 4-bit weights take as plain matrices, of which prompts need one's at a time:
    those of a linear layer, no more than two that are joined as large as any, or of experts in 4 bits."""
    packed = load_int4.held_forms(made, rank) if form.keeps_int4 else {}
    at, specs = made.layout.coordinates(rank), [pattern.spec for pattern in made.loaded if not pattern.spec.experts]
    wide = [spec for spec in specs if spec in packed or (form.keeps_float8 and keeps_as_float8(spec))]
    sizes = [2 * prod(length for _, length in made.cuts.values(spec, at)) for spec in wide]
    for block in moe_blocks(made.model):
        held = [spec for spec in int4_experts(block) if spec in packed]
        one = sum(prod(length for _, length in made.cuts.values(spec, at)) for spec in held)
        sizes.append(len(made.experts(rank, block.expert_axis)) * one)
    return itemsize * max(sizes, default=0)


def require_memory(made: Plan, holding: Holding, *, world: Communicator, device: torch.device, asked: bool) -> None:
    """DoesNotFit, on all ranks, when weights, cache and activations are more than some memory has free.

    asked  whether the user chose the size of the cache, so that a smaller one is a way out
    """
    rank = world.ranks[world.rank]
    on = f"the GPU of rank {rank}" if holding.on_gpus else f"host {socket.gethostname()}"
    memory = torch.cuda.mem_get_info(device) if holding.on_gpus else host_memory()
    found: list[_Place] = [_Place(on, (holding.need(made, rank),), *memory)]
    found = _joined(place for each in world.all_gather_object(found) for place in each)
    short = [place for place in found if place.missing > 0]
    if not short:
        return
    ways = _ways_out(made, holding, min(place.free for place in found), asked)
    worst = max(short, key=lambda place: place.missing)
    raise DoesNotFit(
        f"no memory for the model on {len(short)} of {len(found)} {'GPUs' if holding.on_gpus else 'hosts'}: "
        f"{worst.describe(holding)}; what fits: "
        + ("; or ".join(islice(ways, SHOWN)) or f"nothing {'on eight times as many' if holding.on_gpus else 'here'}")
    )


@dataclass(frozen=True)
class _Place:
    """A memory, and the ranks that share it."""

    name: str
    needs: tuple[Need, ...]
    free: int
    total: int

    @property
    def missing(self) -> int:
        return sum(need.total for need in self.needs) - self.free

    def describe(self, holding: Holding) -> str:
        weights, cache, states, work = (
            sum(getattr(n, part) for n in self.needs) for part in ("weights", "cache", "states", "work")
        )
        of_states = f", {_gib(states)} of states of {holding.stateful} sequences" if states else ""
        return (
            f"{_gib(weights)} of weights ({holding.form.reason}), {_gib(cache)} of cache for {holding.tokens} tokens"
            f"{of_states} and {_gib(work)} for activations and workspaces, but {self.name} has {_gib(self.free)} of "
            f"{_gib(self.total)} free"
        )


def _joined(places: Iterable[_Place]) -> list[_Place]:
    """One of each name, in order."""
    joined: dict[str, _Place] = {}
    for place in places:
        old = joined.get(place.name)
        free = place.free if old is None else min(old.free, place.free)
        needs = place.needs if old is None else old.needs + place.needs
        joined[place.name] = replace(place, needs=needs, free=free)
    return list(joined.values())


def _ways_out(made: Plan, holding: Holding, free: int, asked: bool) -> Iterator[str]:
    tokens = holding.most_tokens(made, free) if asked else 0
    if tokens:
        yield f"cache_tokens {tokens}"
    if holding.dtype.itemsize > 2 and replace(holding, dtype=torch.bfloat16).fits(made, free):
        yield "dtype bfloat16"
    if holding.on_gpus:
        yield from (str(layout) for layout in _larger(made, holding, free))
    elif replace(holding, form=replace(holding.form, native_blocks=True)).fits(made, free):
        yield "weights native"


def _larger(made: Plan, holding: Holding, free: int) -> Iterator[ParallelLayout]:
    """Layouts that fit on as few more ranks as may be: with more of tp, or of tp and ep."""
    old = made.layout
    for times in GROWTH:
        found = False
        for ep in dict.fromkeys((old.moe_ep, old.moe_ep * times if made.model.has_experts else old.moe_ep)):
            try:
                larger = plan(made.model, ParallelLayout(old.tp * times, old.attn_dp, 0, ep))
            except ValueError:  # a size that the model does not allow
                continue
            if holding.fits(larger, free):
                found = True
                yield larger.layout
        if found:
            return


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
