"""The collectives that follow from the axes, per token of a forward pass.

A matmul that contracts over a cut axis leaves a partial sum (all-reduce); an output along a cut axis stays cut until
someone needs it whole (all-gather of logits); tokens of other data-parallel ranks reach experts by all-to-all, or by
all-gather and reduce-scatter where experts are cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Attention, Block, Mamba2, Moe

PARTIAL_SUM_BYTES = 4
"""Statistics (mean squares) are reduced in float32."""
CHOICE_BYTES = 12
"""Of each expert that a token on its way to them has chosen: its number and its weight."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective of a forward pass."""

    where: str
    op: str
    """`all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all`."""
    axis: str
    """Mesh axis, or `world`."""
    bytes_per_token: int
    """Payload of one token on one rank: the reduced vector, the gathered vector, the dispatched hidden states with
    their choices. 0: a few bytes, however many tokens there are."""
    count: int
    """Times in one forward pass."""


def collectives(model: ModelSpec, layout: ParallelLayout, itemsize: int = 2) -> tuple[Collective, ...]:
    """All collectives of one forward pass with activations of `itemsize` bytes. Empty for one rank."""
    found: dict[tuple[str, str, str, int], int] = {}

    def add(times: int, items: Iterator[Collective]) -> None:
        for c in items:
            key = (c.where, c.op, c.axis, c.bytes_per_token)
            found[key] = found.get(key, 0) + c.count * times

    hidden = model.hidden * itemsize
    if layout.tp > 1:
        add(1, iter([Collective("embedding", "all_reduce", "tp", hidden, 1)]))
    for layer, numbers in model.layer_groups():
        add(len(numbers), _layer(layer, layout, hidden, itemsize))
    if layout.tp > 1:
        add(1, iter([Collective("head", "all_gather", "tp", model.vocab * itemsize, 1)]))
    return tuple(Collective(*key, count) for key, count in found.items())


def _layer(layer: Layer, layout: ParallelLayout, hidden: int, itemsize: int) -> Iterator[Collective]:
    moe = next((f for f in layer.feed_forward if isinstance(f, Moe)), None)
    dense = any(not isinstance(f, Moe) for f in layer.feed_forward)
    joined = layer.parallel_residual and moe is None
    if layer.mixers and layout.tp > 1:
        for mixer in layer.mixers:
            yield from _inside(mixer, layout.tp)
        yield Collective("layer" if joined else "mixer", "all_reduce", "tp", hidden, 1)
    if (dense and layout.tp > 1 and not joined) and (moe is None or layout.attn_dp > 1):
        yield Collective("mlp", "all_reduce", "tp", hidden, 1)
    if moe is not None:
        yield from _experts(moe, layout, hidden, itemsize)


def _inside(mixer: Block, tp: int) -> Iterator[Collective]:
    """Norms that span ranks need a mean of squares from all of them."""
    if isinstance(mixer, Attention) and mixer.qk_norm == "all_heads":
        yield Collective("qk_norm", "all_reduce", "tp", 2 * PARTIAL_SUM_BYTES, 1)
    if isinstance(mixer, Mamba2) and mixer.gated_norm and mixer.norm_groups < tp:
        yield Collective("gated_norm", "all_reduce", "tp", mixer.norm_groups * PARTIAL_SUM_BYTES, 1)


def _experts(moe: Moe, layout: ParallelLayout, hidden: int, itemsize: int) -> Iterator[Collective]:
    if layout.attn_dp == 1:
        if layout.world > 1:
            yield Collective("moe", "all_reduce", "world", hidden, 1)
        return
    if layout.moe_ep > 1 and layout.moe_tp == 1:  # each of a group's ranks cares for its part of the group's tokens
        width = moe.latent * itemsize if moe.latent else hidden
        copies = min(moe.routing.top_k, layout.moe_ep)
        there = copies * (width + moe.routing.top_k * CHOICE_BYTES)
        yield Collective("moe_counts", "all_to_all", "moe_ep", 0, 1)
        yield Collective("moe_dispatch", "all_to_all", "moe_ep", -(-there // layout.tp), 1)
        yield Collective("moe_combine", "all_to_all", "moe_ep", -(-copies * width // layout.tp), 1)
    else:
        yield Collective("moe_counts", "all_gather", "attn_dp", 0, 1)
        yield Collective("moe_dispatch", "all_gather", "attn_dp", hidden, 1)
        yield Collective("moe_combine", "reduce_scatter", "world", hidden, 1)
    if layout.tp > 1:
        yield Collective("moe", "all_reduce", "tp", hidden, 1)
