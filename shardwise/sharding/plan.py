"""`plan(model, ...)`: a layout applied to a model; for every rank and tensor the index ranges, bytes, collectives."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwise.sharding.axes import CUTTING, Axis, LogicalAxis, MeshAxis
from shardwise.sharding.collectives import Collective, collectives
from shardwise.sharding.cutting import Cutting, axes_of
from shardwise.sharding.experts import Placement, check_placement, place_experts
from shardwise.sharding.formats import storage_type
from shardwise.sharding.holdings import Held, Holdings, by_mesh_axes, total
from shardwise.sharding.layout import Coordinates, ParallelLayout
from shardwise.sharding.memory import CacheEntry, cache_entries
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.names import NameIndex, expand
from shardwise.sharding.parts import alike_places, check_grids
from shardwise.sharding.shards import Cuts, TensorPattern, TensorShard, local_count, patterns_of
from shardwise.sharding.source import load_model

KV_ITEMSIZES = (1, 2, 4)
"""Bytes that an element of the cache may take."""


@dataclass(frozen=True, slots=True)
class RankTotals:
    """Sums over what one rank holds."""

    rank: int
    coordinates: Coordinates
    weight_bytes: int
    """As stored, with scales, biases and padding; without extras."""
    parameters: int
    """Logical parameters, replicated ones included."""
    tensors: int
    kv_bytes_per_token: int
    """All attention layers at full length; `Plan.cache_bytes` knows windows."""
    state_bytes_per_sequence: int


@dataclass(frozen=True)
class Plan:
    """A model under a layout. Everything else is derived, on demand and cached."""

    model: ModelSpec
    layout: ParallelLayout
    cuts: Cuts
    patterns: tuple[TensorPattern, ...]
    """In model order; those of extras that are not loaded come last and count nowhere."""
    warnings: tuple[str, ...]
    kv_itemsize: int
    pad: tuple[str, ...]
    """Axes that were asked to be padded, sorted."""
    alike: Mapping[MeshAxis, tuple[int, ...]] = field(compare=False, repr=False)
    """For every place on a mesh axis the first one that holds as much."""
    holdings: tuple[Holdings, ...] = field(compare=False, repr=False)
    """Of the patterns that a run loads, by the mesh axes that cut them."""

    def shard(self, rank: int, tensor_name: str) -> TensorShard:
        """What `rank` holds of the tensor; KeyError for a name that the model does not have."""
        pattern, _, expert = self._names.find(tensor_name)
        return self.cuts.shard(pattern.spec, self.layout.coordinates(rank), tensor_name, expert)

    def names(self) -> Iterator[str]:
        """Every tensor name of the model, expanded, in model order, extras left out."""
        for pattern in self.loaded:
            yield from (name for name, _ in expand(pattern))

    def shards(self, rank: int) -> Iterator[TensorShard]:
        """Every tensor that the rank holds part of, expanded, in model order."""
        at = self.layout.coordinates(rank)
        for pattern in self.loaded:
            for name, expert in expand(pattern):
                shard = self.cuts.shard(pattern.spec, at, name, expert)
                if shard.held:
                    yield shard

    def pattern_shard(self, pattern: TensorPattern, rank: int) -> TensorShard:
        """What `rank` holds of each tensor of a pattern (of each expert that is its own)."""
        return self.cuts.shard(pattern.spec, self.layout.coordinates(rank), pattern.spec.name)

    def pattern_count(self, pattern: TensorPattern, rank: int) -> int:
        """Tensors of the pattern that `rank` holds."""
        return local_count(pattern, self.cuts, self.layout.coordinates(rank))

    def experts(self, rank: int, axis: LogicalAxis) -> tuple[int, ...]:
        """Expert numbers on `rank` in slot order, for the expert axis of a `Moe` block."""
        return self.cuts.held_experts(axis, self.layout.coordinates(rank))

    @property
    def loaded(self) -> tuple[TensorPattern, ...]:
        """Patterns that a run loads."""
        return tuple(p for p in self.patterns if p.loaded)

    def held(self, rank: int) -> Iterator[Held]:
        """What `rank` holds of every pattern that a run loads, ordered by the mesh axes that cut it."""
        at = self._alike(self.layout.coordinates(rank))
        return (held for holdings in self.holdings for held in holdings.at(at))

    @cached_property
    def ranks(self) -> tuple[RankTotals, ...]:
        """Totals of every rank, in rank order."""
        return tuple(self.rank(r) for r in range(self.layout.world))

    def rank(self, rank: int) -> RankTotals:
        """Totals of one rank."""
        at = self.layout.coordinates(rank)
        amount, cache = total(holdings.amount(self._alike(at)) for holdings in self.holdings), self.cache(rank)
        return RankTotals(
            rank,
            at,
            *amount,
            sum(c.layers * c.token_bytes // c.tokens_per_entry for c in cache),
            sum(c.layers * c.sequence_bytes for c in cache),
        )

    @cached_property
    def fullest_rank(self) -> int:
        """The rank with the most weight bytes, the first of equals."""
        ranks = range(self.layout.world)
        kinds = list(self.layout.along(*(self.alike[mesh] for mesh in CUTTING)))
        first = dict(zip(reversed(kinds), reversed(ranks), strict=True))  # of equal kinds the last one stays
        return first[max(first, key=lambda kind: (self._weight_bytes(*kind), -first[kind]))]

    def _weight_bytes(self, tp: int, moe_tp: int, moe_ep: int) -> int:
        at = Coordinates(tp, 0, moe_tp, moe_ep)
        return sum(holdings.amount(at).weight_bytes for holdings in self.holdings)

    def _alike(self, at: Coordinates) -> Coordinates:
        """The first places on the mesh axes where a rank holds as much as at these."""
        tp, moe_tp, moe_ep = (self.alike[mesh][getattr(at, mesh)] for mesh in CUTTING)
        return Coordinates(tp, 0, moe_tp, moe_ep)

    def cache(self, rank: int) -> tuple[CacheEntry, ...]:
        """KV and state cache of every kind of layer on `rank`."""
        at = self._alike(self.layout.coordinates(rank))
        if at.tp not in self._caches:  # attention and states are cut over tp alone
            entries = cache_entries(self.model, lambda axis: self.cuts.share(axis, at), self.kv_itemsize)
            self._caches[at.tp] = entries
        return self._caches[at.tp]

    @cached_property
    def _caches(self) -> dict[int, tuple[CacheEntry, ...]]:
        return {}

    def cache_bytes(self, rank: int, context: int, batch: int = 1) -> int:
        """Cache of `batch` sequences of `context` tokens on `rank`, sliding windows and compression respected."""
        return batch * sum(entry.bytes_at(context) for entry in self.cache(rank))

    @property
    def imbalance(self) -> float:
        """How much more weight bytes the fullest rank holds than the average, as a fraction."""
        held = [r.weight_bytes for r in self.ranks]
        return max(held) * len(held) / sum(held) - 1

    @property
    def parameters(self) -> int:
        """Logical parameters of the text decoder, each once."""
        return sum(p.count * p.spec.parameters for p in self.patterns if p.part == "text")

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Collectives of one forward pass, activations in 2 bytes (4 where the model is float32)."""
        return collectives(self.model, self.layout, 4 if self.model.dtype == "F32" else 2)

    @cached_property
    def _names(self) -> NameIndex:
        return NameIndex(self.patterns)


def plan(
    model: ModelSpec | Mapping[str, Any] | str | Path,
    layout: ParallelLayout | None = None,
    *,
    tp: int = 1,
    ep: int = 1,
    moe_tp: int = 0,
    attn_dp: int = 1,
    pad: Iterable[str] = (),
    extras: Iterable[str] = (),
    dtype: str | None = None,
    kv_itemsize: int = 2,
    redundant_experts: int = 0,
    expert_load: tuple[float, ...] | None = None,
    expert_placement: Placement | None = None,
    tp_plan: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of `model` under a layout.

    `model`: a ModelSpec, the object of a config.json, a path to a config.json (`-` reads standard input), a model
    folder or a GGUF file, or a name that `checkpoint.resolve` knows. `layout`, or the sizes of its mesh axes. `pad`:
    axes whose ranks get equal lengths by padding. `extras`: names of extras to load as well (`vision`, `mtp`).
    `kv_itemsize`: bytes of a cached element. `dtype`: what if the weights that are not quantised had this type
    (`bfloat16`, `float32`, ...). `redundant_experts`, `expert_load`: copies of experts and where they go, see
    `place_experts`; `expert_placement` says it outright. `tp_plan`: Transformers' module globs to styles, for an
    architecture that no family describes.
    Raises IllegalLayout (a ValueError) with reasons and alternatives, ConfigError for an unusable config,
    CheckpointError for unreadable headers, TypeError for a layout of another type.
    """
    if not isinstance(layout, ParallelLayout | None):
        raise TypeError(f"layout is {layout!r}: give a ParallelLayout, or the sizes by name: plan(model, tp=2)")
    spec = model if isinstance(model, ModelSpec) else load_model(model, tp_plan)
    spec = spec.stored_as(storage_type(dtype)) if dtype else spec
    if moe_tp == ep == 1 and not spec.has_experts:  # tables of layouts say so of dense models
        moe_tp = 0
    sizes = ParallelLayout(tp, attn_dp, moe_tp, ep)
    if layout is not None and sizes != ParallelLayout():
        raise ValueError(f"a layout ({layout}) and sizes of mesh axes ({sizes}) are given: drop one of them")
    planner = Planner(
        spec,
        pad=pad,
        extras=extras,
        kv_itemsize=kv_itemsize,
        redundant_experts=redundant_experts,
        expert_load=expert_load,
        expert_placement=expert_placement,
    )
    return planner.plan(layout or sizes)


class Planner:
    """Plans of one model under any layout; options are those of `plan`.

    What layouts have in common is worked out once: the cut of an axis over so many ranks, which places of a mesh axis
    are alike, and what ranks hold of the patterns that the same mesh axes cut.
    """

    def __init__(
        self,
        model: ModelSpec,
        *,
        pad: Iterable[str] = (),
        extras: Iterable[str] = (),
        kv_itemsize: int = 2,
        redundant_experts: int = 0,
        expert_load: tuple[float, ...] | None = None,
        expert_placement: Placement | None = None,
    ):
        if kv_itemsize not in KV_ITEMSIZES:
            raise ValueError(f"kv_itemsize is {kv_itemsize!r}, expected {', '.join(map(str, KV_ITEMSIZES))}")
        for option, names in (("extras", extras), ("pad", pad)):
            if isinstance(names, str) or not isinstance(names, Iterable):
                raise TypeError(f"{option} is {names!r}: give a list of names")
        extras, self._pad = tuple(extras), tuple(sorted(set(pad)))
        _check_names("extras", extras, (e.name for e in model.extras if e.tensors))
        self._model, self._kv_itemsize = model, kv_itemsize
        self._patterns = patterns_of(model, frozenset(extras))
        loaded = [p for p in self._patterns if p.loaded]
        self._specs, self._groups = tuple(p.spec for p in loaded), by_mesh_axes(loaded)
        _check_names("pad", self._pad, (a.axis.value for a in axes_of(self._specs)))
        check_grids(self._specs)
        self._cutting = Cutting(self._specs, map(Axis, self._pad))
        self._redundant, self._load, self._placement = redundant_experts, expert_load, expert_placement
        self._placements: dict[tuple[LogicalAxis, int], Placement] = {}
        self._holdings: dict[tuple, Holdings] = {}
        self._alike: dict[tuple[MeshAxis, int], tuple[int, ...]] = {}

    def plan(self, layout: ParallelLayout) -> Plan:
        """The plan under this layout. IllegalLayout with reasons and alternatives where the model cannot be cut so."""
        by_axis, warnings = self._cutting.under(layout)
        warnings += _without_experts(by_axis, layout, self._redundant, self._load)
        experts = (axis for axis in by_axis if axis.axis is Axis.EXPERTS)
        cuts = Cuts(layout, by_axis, {axis: self._place(axis, layout.moe_ep) for axis in experts})
        return Plan(
            self._model,
            layout,
            cuts,
            self._patterns,
            warnings + self._model.notes,
            self._kv_itemsize,
            self._pad,
            {mesh: self._alike_on(mesh, cuts) for mesh in CUTTING},
            tuple(self._holdings_of(axes, cuts) for axes in self._groups),
        )

    def _place(self, axis: LogicalAxis, ranks: int) -> Placement:
        if (axis, ranks) not in self._placements:
            if self._placement is None:
                self._placements[axis, ranks] = place_experts(axis, ranks, self._redundant, self._load)
            else:
                stacked = any(axis in dim.axes for spec in self._specs for dim in spec.dims)
                check_placement(self._placement, axis, ranks, stacked=stacked)
                self._placements[axis, ranks] = self._placement
        return self._placements[axis, ranks]

    def _alike_on(self, mesh: MeshAxis, cuts: Cuts) -> tuple[int, ...]:
        key = mesh, cuts.size(mesh)
        if key not in self._alike:
            self._alike[key] = alike_places(mesh, self._specs, cuts)
        return self._alike[key]

    def _holdings_of(self, axes: tuple[MeshAxis, ...], cuts: Cuts) -> Holdings:
        key = axes, *map(cuts.size, axes)
        return self._holdings.setdefault(key, Holdings(axes, self._groups[axes], cuts))


def _check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    legal = list(dict.fromkeys(known))
    for name in names:
        if name not in legal:
            raise ValueError(f"{option}: the model has no {name!r}; it has {', '.join(legal) or 'none'}")


def _without_experts(
    axes: Iterable[LogicalAxis], layout: ParallelLayout, redundant: int, load: tuple[float, ...] | None
) -> tuple[str, ...]:
    """Warnings for a dense model that is asked to split experts over ranks; ValueError where it is to place copies."""
    if any(axis.axis is Axis.EXPERTS for axis in axes):
        return ()
    if redundant or load is not None:
        asked = f"{redundant} redundant experts" if redundant else "a load of experts"
        raise ValueError(f"{asked}: the model has no routed experts")
    return (f"ep {layout.moe_ep}: the model has no routed experts, so ep changes nothing",) if layout.moe_ep > 1 else ()
