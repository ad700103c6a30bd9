"""`plan(model, ...)`: a layout applied to a model; for every rank and tensor the index ranges, bytes, collectives."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from shardwise.sharding.axes import Axis, LogicalAxis, MeshAxis
from shardwise.sharding.collectives import Collective, collectives
from shardwise.sharding.cutting import axes_of, choose_cuts
from shardwise.sharding.experts import Placement, place_experts
from shardwise.sharding.formats import storage_type
from shardwise.sharding.layout import Coordinates, ParallelLayout
from shardwise.sharding.memory import CacheEntry, cache_entries
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.names import NameIndex, expand
from shardwise.sharding.shards import Cuts, TensorPattern, TensorShard, local_count, mesh_axes_of
from shardwise.sharding.source import load_model
from shardwise.sharding.tensors import TensorSpec

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
    kv_itemsize: int = 2
    pad: tuple[str, ...] = ()
    """Axes that were asked to be padded, sorted."""

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

    @cached_property
    def ranks(self) -> tuple[RankTotals, ...]:
        """Totals of every rank, in rank order."""
        return tuple(self.rank(r) for r in range(self.layout.world))

    def rank(self, rank: int) -> RankTotals:
        """Totals of one rank."""
        held = [self._held(axes, rank) for axes in self._by_mesh]
        weight_bytes, parameters, tensors = (sum(column) for column in zip(*held, strict=True))
        cache = self.cache(rank)
        return RankTotals(
            rank,
            self.layout.coordinates(rank),
            weight_bytes,
            parameters,
            tensors,
            sum(c.layers * c.token_bytes // c.tokens_per_entry for c in cache),
            sum(c.layers * c.sequence_bytes for c in cache),
        )

    @cached_property
    def _by_mesh(self) -> dict[tuple[MeshAxis, ...], list[TensorPattern]]:
        """Loaded patterns by the mesh axes that cut them."""
        groups: dict[tuple[MeshAxis, ...], list[TensorPattern]] = {}
        for pattern in self.loaded:
            groups.setdefault(mesh_axes_of(pattern.spec), []).append(pattern)
        return groups

    def _held(self, axes: tuple[MeshAxis, ...], rank: int) -> tuple[int, int, int]:
        """Bytes, parameters and tensors that a rank holds of what `axes` cut; ranks at one place on them are alike."""
        at = self.layout.coordinates(rank)
        key = (axes, *(getattr(at, axis) for axis in axes))
        if key not in self._sums:
            parts = [(p, self.pattern_shard(p, rank), self.pattern_count(p, rank)) for p in self._by_mesh[axes]]
            self._sums[key] = (
                sum(shard.nbytes * count for _, shard, count in parts),
                sum(prod(shard.local_shape) * p.spec.values * count for p, shard, count in parts),
                sum(count for _, shard, count in parts if all(shard.local_shape)),
            )
        return self._sums[key]

    @cached_property
    def _sums(self) -> dict[tuple, tuple[int, int, int]]:
        return {}

    def cache(self, rank: int) -> tuple[CacheEntry, ...]:
        """KV and state cache of every kind of layer on `rank`."""
        at = self.layout.coordinates(rank)
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
    sizes = ParallelLayout(tp, attn_dp, moe_tp, ep)
    if layout is not None and sizes != ParallelLayout():
        raise ValueError(f"a layout ({layout}) and sizes of mesh axes ({sizes}) are given: drop one of them")
    layout = layout or sizes
    if kv_itemsize not in KV_ITEMSIZES:
        raise ValueError(f"kv_itemsize is {kv_itemsize!r}, expected {', '.join(map(str, KV_ITEMSIZES))}")
    for option, names in (("extras", extras), ("pad", pad)):
        if isinstance(names, str):
            raise TypeError(f"{option} is {names!r}: give a list of names")
    extras, padded = tuple(extras), tuple(sorted(set(pad)))
    _check_names("extras", extras, (e.name for e in spec.extras if e.tensors))
    patterns = patterns_of(spec, frozenset(extras))
    specs = tuple(p.spec for p in patterns if p.loaded)
    _check_names("pad", padded, (a.axis.value for a in axes_of(specs)))
    by_axis, warnings = choose_cuts(specs, layout, frozenset(map(Axis, padded)))
    warnings += _without_experts(by_axis, layout, redundant_experts, expert_load)
    placement = {
        axis: expert_placement or place_experts(axis, layout.moe_ep, redundant_experts, expert_load)
        for axis in by_axis
        if axis.axis is Axis.EXPERTS
    }
    cuts = Cuts(layout, by_axis, placement)
    cuts.check(specs)
    return Plan(spec, layout, cuts, patterns, warnings + spec.notes, kv_itemsize, padded)


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


def patterns_of(model: ModelSpec, load_extras: frozenset[str] = frozenset()) -> tuple[TensorPattern, ...]:
    """Tensor patterns of a model in order; layers that share a tensor's spec are joined."""
    ends = [TensorPattern(t, None) for t in model.embedding.tensors]
    tail = [t for block in (*model.others, model.final_norm, model.head) for t in block.tensors]
    layers: dict[TensorSpec, list[int]] = {}
    for layer, numbers in model.layer_groups():
        for tensor in layer.tensors:
            layers.setdefault(tensor, []).extend(numbers)
    inside = [TensorPattern(t, tuple(sorted(numbers))) for t, numbers in layers.items()]
    extras = [
        TensorPattern(t, e.layers or None, e.name, e.name in load_extras) for e in model.extras for t in e.tensors
    ]
    return (*ends, *inside, *(TensorPattern(t, None) for t in tail), *extras)
