"""A rank's part of every tensor, on patterns with multiplicities."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from shardwise.sharding.axes import MESH_AXIS, LogicalAxis, MeshAxis, Range, Share, merge, span
from shardwise.sharding.checkpoint.header import STORAGE
from shardwise.sharding.cuts import Cut
from shardwise.sharding.layout import Coordinates, ParallelLayout
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class TensorPattern:
    """All stored tensors of one spec: one for each of `layers` (None: outside of the layers), times its experts."""

    spec: TensorSpec
    layers: tuple[int, ...] | None
    part: str = "text"
    """`text` for the decoder, else the name of the extra it belongs to."""
    loaded: bool = True
    """Part of what a run loads, and so of the ranks' totals."""

    @property
    def count(self) -> int:
        """Tensors of this pattern in the checkpoint."""
        repeats = 1 if self.layers is None else len(self.layers)
        return repeats * (self.spec.experts.units if self.spec.experts else 1)


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


@dataclass(frozen=True, slots=True)
class TensorShard:
    """One rank's part of one stored tensor."""

    name: str
    role: str
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    """With padding, if the axis is padded: then larger than the ranges."""
    ranges: tuple[tuple[Range, ...], ...]
    """For each dim the index ranges to read, ascending; joined in order they fill the local dim from its start."""
    dtype: str
    nbytes: int
    """Bytes of the part as stored: whole quantisation blocks, padding included. 0 where the rank holds none of it."""
    held: bool = True
    """False for an expert of another rank."""

    @property
    def whole(self) -> bool:
        """True where the rank holds the full tensor."""
        return self.held and self.local_shape == self.global_shape


@dataclass(frozen=True)
class Cuts:
    """The cut of every axis, applied to dims, tensors and ranks."""

    layout: ParallelLayout
    by_axis: dict[LogicalAxis, Cut]
    placement: dict[LogicalAxis, tuple[tuple[int, ...], ...]]
    """Expert numbers held by each moe_ep coordinate, in slot order, for each expert axis."""

    def size(self, mesh: MeshAxis) -> int:
        """Places on a mesh axis."""
        return getattr(self.layout, mesh)

    def share(self, axis: LogicalAxis, at: Coordinates) -> Share:
        """What the rank at these coordinates holds of `axis`."""
        mesh = MESH_AXIS[axis.axis]
        if axis in self.placement:
            held = self.placement[axis][at.moe_ep]
            return Share(merge((e, e + 1) for e in held), len(held))
        return self.by_axis[axis].share(getattr(at, mesh))

    def held_experts(self, axis: LogicalAxis, at: Coordinates) -> tuple[int, ...]:
        """Experts of the rank, in slot order."""
        return self.placement[axis][at.moe_ep]

    def shard(self, spec: TensorSpec, at: Coordinates, name: str, expert: int | None = None) -> TensorShard:
        """The part of one tensor named `name` at these coordinates."""
        held = not spec.experts or expert is None or expert in self.placement[spec.experts][at.moe_ep]
        # Hashing a spec costs more than its cut; the entry keeps the spec alive, so that its id stays its own.
        key = (id(spec), at, held)
        if key not in self._parts:
            self._parts[key] = (spec, self._part(spec, at) if held else _absent(spec))
        return TensorShard(name, *self._parts[key][1])

    def values(self, spec: TensorSpec, at: Coordinates) -> tuple[tuple[tuple[Range, ...], int], ...]:
        """(index ranges, local length with padding) of each dim of a weight's values, however they are stored."""
        return tuple(dim.local(lambda axis: self.share(axis, at)) for dim in spec.value_dims)

    def value_parts(self, spec: TensorSpec, at: Coordinates) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(values, padding behind them) of each segment of those dims."""
        return tuple(dim.parts(lambda axis: self.share(axis, at)) for dim in spec.value_dims)

    @cached_property
    def _parts(self) -> dict[tuple[int, Coordinates, bool], tuple[TensorSpec, tuple]]:
        return {}

    def _part(self, spec: TensorSpec, at: Coordinates) -> tuple:
        """The fields of a TensorShard after its name."""
        dims = [dim.local(lambda axis: self.share(axis, at)) for dim in spec.dims]
        ranges = tuple(r for r, _ in dims)
        local = tuple(length for _, length in dims)
        return spec.role, spec.shape, local, ranges, spec.dtype, _nbytes(spec.dtype, local, ranges)


def _absent(spec: TensorSpec) -> tuple:
    rank = len(spec.dims)
    return spec.role, spec.shape, (0,) * rank, ((),) * rank, spec.dtype, 0, False


def _nbytes(dtype: str, local: tuple[int, ...], ranges: tuple[tuple[Range, ...], ...]) -> int:
    block, size = STORAGE[dtype]
    if not local:
        return size
    return prod(local[:-1]) * stored_length(ranges[-1], local[-1], block) * size


def stored_length(ranges: tuple[Range, ...], length: int, block: int) -> int:
    """Blocks of `block` elements that a rank's part of the last dim touches, padding to `length` elements included."""
    if block == 1:
        return length
    return sum(-(-b // block) - a // block for a, b in ranges) + -(-(length - span(ranges)) // block)


def mesh_axes_of(spec: TensorSpec) -> tuple[MeshAxis, ...]:
    """The mesh axes on which a rank's place decides what it holds of the tensor, sorted."""
    experts = {MeshAxis.MOE_EP} if spec.experts else set()
    return tuple(sorted(experts | {MESH_AXIS[a.axis] for dim in spec.dims for a in dim.axes}))


def local_count(pattern: TensorPattern, cuts: Cuts, at: Coordinates) -> int:
    """Tensors of the pattern that the rank holds, copies of redundant experts included."""
    repeats = 1 if pattern.layers is None else len(pattern.layers)
    experts = pattern.spec.experts
    return repeats * (len(cuts.held_experts(experts, at)) if experts else 1)
