"""What the places of a mesh axis hold: the self-check that their parts are the whole, and which places are alike."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

from shardwise.sharding.axes import CUTTING, MESH_AXIS, SHARED_BY_RANKS, Dim, MeshAxis, Range, span
from shardwise.sharding.checkpoint.header import STORAGE
from shardwise.sharding.layout import Coordinates
from shardwise.sharding.shards import Cuts, stored_length
from shardwise.sharding.tensors import TensorSpec


def check_parts(specs: Iterable[TensorSpec], cuts: Cuts) -> None:
    """AssertionError unless the parts of each tensor are the tensor and overlap only where that is declared."""
    specs = tuple(specs)
    check_grids(specs)
    for mesh in CUTTING:
        alike_places(mesh, specs, cuts)


def check_grids(specs: Iterable[TensorSpec]) -> None:
    """AssertionError for a tensor that two mesh axes would cut where they can not."""
    for spec in specs:
        cut_by = [mesh for dim in spec.dims for mesh in {MESH_AXIS[a.axis] for a in dim.axes}]
        _require(len(set(cut_by)) == len(cut_by), f"{spec.name}: two dims are cut over one mesh axis of {cut_by}")
        # Ranks that differ in tp need not differ in moe_tp, so the two grids never meet in one tensor.
        _require(MeshAxis.TP not in cut_by or len(cut_by) == 1, f"{spec.name}: cut over {cut_by}, of two grids")


def alike_places(mesh: MeshAxis, specs: Iterable[TensorSpec], cuts: Cuts) -> tuple[int, ...]:
    """For every place on the mesh axis the first one that holds as much of everything. The parts are checked."""
    places = [Coordinates(i, 0, i, i) for i in range(cuts.size(mesh))]
    amounts = [[0] * len(places)]
    for axis in (axis for axis in cuts.by_axis if MESH_AXIS[axis.axis] is mesh):
        amounts.append([cuts.share(axis, at).length for at in places])
        if axis in cuts.placement:
            wrong = set(range(axis.units)).symmetric_difference(chain(*cuts.placement[axis]))
            _require(not wrong, f"experts {sorted(wrong)} are on no rank, or there are none")
    for dim, blocks in _dims_on(mesh, specs).items():
        parts = [dim.local(partial(cuts.share, at=at)) for at in places]
        _check_dim(dim, [ranges for ranges, _ in parts], cuts)
        amounts += [[stored_length(*part, block) for part in parts] for block in blocks]
    first: dict[tuple[int, ...], int] = {}
    return tuple(first.setdefault(alike, place) for place, alike in enumerate(zip(*amounts, strict=True)))


def _dims_on(mesh: MeshAxis, specs: Iterable[TensorSpec]) -> dict[Dim, set[int]]:
    """Distinct dims that the mesh axis cuts, with the sizes of the storage blocks that they are counted in."""
    found: dict[Dim, set[int]] = {}
    for spec in specs:
        for dim in spec.dims:
            meshes = {MESH_AXIS[axis.axis] for axis in dim.axes}
            _require(len(meshes) <= 1, f"{spec.name}: one dim cut over {sorted(meshes)}")
            if mesh in meshes:
                found.setdefault(dim, {1}).add(STORAGE[spec.dtype][0] if dim is spec.dims[-1] else 1)
    return found


def _check_dim(dim: Dim, parts: Sequence[tuple[Range, ...]], cuts: Cuts) -> None:
    reached = 0
    for start, stop in sorted(r for part in parts for r in part):
        _require(start <= reached, f"elements {reached} to {start} of a dim of {dim.length} are on no rank")
        reached = max(reached, stop)
    _require(reached == dim.length, f"elements {reached} to {dim.length} of a dim are on no rank")
    total = sum(map(span, parts))
    _require(
        total == dim.length or _overlap_declared(dim, cuts), f"undeclared overlap: {total} of {dim.length} elements"
    )


def _overlap_declared(dim: Dim, cuts: Cuts) -> bool:
    return (
        dim.per > 1
        or any(s.axis is None for s in dim.segments)
        or any(a in cuts.placement or a.axis in SHARED_BY_RANKS for a in dim.axes)
    )


def _require(holds: bool, what: str) -> None:
    """Plans are checked under `python -O` too, which leaves assert statements out."""
    if not holds:
        raise AssertionError(what)
