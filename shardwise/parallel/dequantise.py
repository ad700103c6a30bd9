"""Weights that are stored as codes and scales, as plain ones: `(code - zero) * scale`, whatever their format.

A rank's part of a weight is given by the indices of its values. The tensors beside it are coarser: words hold several
codes, scales stand for groups, channels or tiles, so a rank has read those that enclose its values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from shardwise.ops.quantization.floats import e2m1_decode, e8m0_decode
from shardwise.parallel.storage import EXPONENTS
from shardwise.sharding.axes import Range
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.packing import Packing
from shardwise.sharding.tensors import TensorSpec

PIECE_VALUES = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Dequantised at once: bounds the temporaries, which take some 20 bytes a value."""
Ranges = Sequence[Range]


@dataclass(frozen=True)
class Part:
    """What a rank has read of one stored tensor, without padding."""

    spec: TensorSpec
    ranges: tuple[Ranges, ...]
    """Indices of the stored elements, each dimension."""
    values: Tensor
    """Those dimensions, a scalar as [1]; of a stack of alike weights with one more before them."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Of a stack, the number of weights."""
        return self.values.shape[: self.values.dim() - max(1, len(self.ranges))]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one weight."""
        return self.values.shape[len(self.lead) :]

    def of_expert(self, place: int) -> "Part":
        """One matrix of stacked ones."""
        return replace(self, ranges=self.ranges[1:], values=self.values[place])


def dequantise(out: Tensor, rows: Ranges, columns: Ranges, parts: Mapping[str, Part]) -> None:
    """Write a weight's values into `out` [.., out, in], of any floating type.

    rows, columns  indices of the outputs and inputs in the whole weight; `out` has as many of each
    parts          by what follows the weight's role: weight, scale, and where there are such zeros, group_index,
                   global_scale, global_divisor
    CheckpointError for a row whose group is not among those of this rank.
    """
    if out.dim() == 3:
        for place, matrix in enumerate(out):
            one = {name: part.of_expert(place) if _is_stacked(part, len(out)) else part for name, part in parts.items()}
            CodedMatrix(one, rows, columns).write(matrix)
        return
    CodedMatrix(parts, rows, columns).write(out)


class CodedMatrix:
    """One weight, or a stack of alike ones, as codes, scales and zero points in the order of the stored dimensions."""

    def __init__(self, parts: Mapping[str, Part], rows: Ranges, columns: Ranges):
        """Arguments and errors as `dequantise`."""
        self.turned = parts["weight"].spec.transposed
        """[in, out]."""
        outputs, inputs = _indices(rows), _indices(columns)
        self.groups = _groups(parts, inputs, dim=0 if self.turned else 1)
        """For each input, the place of its scale."""
        self.lead = parts["weight"].lead
        self.shape = (len(inputs), len(outputs)) if self.turned else (len(outputs), len(inputs))
        on_device = self.groups.to(parts["weight"].values.device)

        def grid(values: Tensor, part: Part) -> _Grid:
            return _Grid.of(values, part, outputs, on_device, self.turned)

        self.scale = grid(_scale(parts), parts["scale"])
        self.zero = grid(_codes(parts["zeros"]), parts["zeros"]) if "zeros" in parts else None
        self.codes = _Codes(parts["weight"], *((inputs, outputs) if self.turned else (outputs, inputs)))

    def write(self, out: Tensor) -> None:
        """The values, into [.., out, in]."""
        target = out.mT if self.turned else out
        step = max(1, PIECE_VALUES[out.device.type] // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            piece = slice(first, min(first + step, self.shape[0]))
            values = self.codes.rows(piece)
            values -= self.codes.middle if self.zero is None else self.zero.rows(piece)
            values *= self.scale.rows(piece)
            target[..., piece, :] = values


class _Codes:
    """Codes [first, second] of a weight, [out, in] or [in, out] as they are stored; numbers in float32."""

    def __init__(self, part: Part, first: Tensor, second: Tensor):
        packing = part.spec.packing
        self.part = _without_blocks(part)
        self.count = packing.count if packing and packing.dim == -2 else 1
        """Rows of a word."""
        is_words = packing is not None and not _is_float4(part)
        self.middle = float(1 << packing.bits - 1) if packing and is_words else 0.0
        """Of unsigned codes that have no zero points."""
        self.first = _places(self.part, 0, first)
        self.second = _unless_all(_places(self.part, 1, second), self.part, 1)

    def rows(self, piece: slice) -> Tensor:
        """Of some of the first dimension's values, a new tensor."""
        places = self.first[piece]
        low, high = int(places[0]) // self.count, int(places[-1]) // self.count + 1
        codes = _codes(replace(self.part, values=self.part.values[..., low:high, :]))
        places = places - low * self.count
        if len(places) < codes.shape[-2]:
            codes = codes.index_select(-2, places.to(codes.device))
        return codes if self.second is None else codes.index_select(-1, self.second)


@dataclass(frozen=True)
class _Grid:
    """Scales or zero points in the order of a weight's dimensions: one an output or for all, times one a group of
    inputs or for all."""

    values: Tensor
    groups: Tensor
    """For each input, its group."""
    turned: bool
    """Inputs come first."""

    @classmethod
    def of(cls, values: Tensor, part: Part, outputs: Tensor, groups: Tensor, turned: bool) -> "_Grid":
        """`values`: those of the part, unpacked."""
        if prod(values.shape[len(part.lead) :]) == 1:
            return cls(values.view(*part.lead, 1, 1), groups, turned)
        dim = 1 if turned else 0
        places = None if values.shape[dim - 2] == 1 else _unless_all(_places(part, dim, outputs), part, dim)
        return cls(values if places is None else values.index_select(dim - 2, places), groups, turned)

    def outputs_first(self) -> Tensor:
        """[.., out, groups], either of which may be 1."""
        return self.values.mT if self.turned else self.values

    def rows(self, piece: slice) -> Tensor:
        """Those of some inputs where inputs come first, else of some outputs."""
        first, second = self.values.shape[-2:]
        if self.turned:
            return self.values if first == 1 else self.values.index_select(-2, self.groups[piece])
        some = self.values if first == 1 else self.values[..., piece, :]
        return some if second == 1 else some.index_select(-1, self.groups)


def _scale(parts: Mapping[str, Part]) -> Tensor:
    """float32, with the factor of the whole tensor in it."""
    part = parts["scale"]
    scale = e8m0_decode(part.values) if part.spec.dtype in EXPONENTS else part.values.float()
    if "global_scale" in parts:
        scale = scale * _factor(parts["global_scale"])
    if "global_divisor" in parts:
        scale = scale / _factor(parts["global_divisor"])
    return scale


def _factor(part: Part) -> Tensor:
    """float32, one a weight, to be multiplied with its matrix."""
    return part.values.float().view(*part.lead, 1, 1) if part.lead else part.values.float()


def _groups(parts: Mapping[str, Part], inputs: Tensor, dim: int) -> Tensor:
    """For each input, the place of its scale among those of this rank. `dim`: of the scales, that inputs have."""
    scale, index = parts["scale"], parts.get("group_index")
    if prod(scale.shape) == 1 or scale.shape[dim] == 1:
        return torch.zeros_like(inputs)
    if index is None:
        return _places(scale, dim, inputs)
    orders = index.values.cpu().long().view(-1, *index.shape).unique(dim=0)
    # Negative: which says that there is no order.
    first, *others = (_places(scale, dim, inputs) if (o < 0).any() else _held(scale, dim, o, index) for o in orders)
    if not all(torch.equal(first, other) for other in others):
        raise _misordered(index)
    return first


def _held(scale: Part, dim: int, wanted: Tensor, index: Part) -> Tensor:
    """Places of the groups `wanted` among those of this rank; CheckpointError for one that is not."""
    held = _indices(scale.ranges[dim])
    places = torch.searchsorted(held, wanted).clamp(max=len(held) - 1)
    if not torch.equal(held[places], wanted):
        raise _misordered(index)
    return places


def _misordered(index: Part) -> CheckpointError:
    return CheckpointError(
        f"{index.spec.name}: rows are not in the order of their groups, though the config says so: set desc_act to "
        "true in its quantization_config, so that every rank keeps all groups"
    )


def _codes(part: Part) -> Tensor:
    """The part's codes, unpacked, as float32."""
    values, packing = part.values, part.spec.packing
    if packing is None:
        return values.float()
    if not _is_float4(part):
        return ((_fields(values, packing) + packing.added) & (1 << packing.bits) - 1).float()
    return e2m1_decode(_fields(values.view(torch.uint8), packing))


def _fields(elements: Tensor, packing: Packing) -> Tensor:
    """Integers [.., n, ..] -> [.., n * count, ..], of which `packing.bits` bits count."""
    shifts = torch.tensor(packing.fields, dtype=elements.dtype, device=elements.device) * packing.bits
    shifts = shifts.view(-1, *[1] * (-1 - packing.dim))
    fields = elements.unsqueeze(elements.dim() + packing.dim + 1) >> shifts
    return fields.flatten(packing.dim - 1, packing.dim)


def _is_float4(part: Part) -> bool:
    return part.values.dtype in (torch.uint8, torch.int8)


def _is_stacked(part: Part, experts: int) -> bool:
    return part.values.dim() > 0 and len(part.values) == experts


def _without_blocks(part: Part) -> Part:
    """A weight whose blocks have a dimension of their own, as [out, bytes]."""
    packing = part.spec.packing
    if packing is None or not packing.blocks:
        return part
    size, blocks = part.values.shape[-1], part.spec.dims[-2]
    columns = tuple((a * size, b * size) for a, b in part.ranges[-2])
    dims = (*part.spec.dims[:-2], replace(blocks, per=blocks.per // size))
    return Part(replace(part.spec, dims=dims), (*part.ranges[:-2], columns), part.values.flatten(-2))


def _places(part: Part, dim: int, wanted: Tensor) -> Tensor:
    """Where in the unpacked part, along one of its two dimensions, values of these indices lie."""
    per, packing = part.spec.dims[dim - 2].per, part.spec.packing
    places = torch.searchsorted(_indices(part.ranges[dim]), wanted // per)
    if packing is None or packing.dim != dim - 2:
        return places
    return places * packing.count + wanted % packing.count


def _unless_all(places: Tensor, part: Part, dim: int) -> Tensor | None:
    """`places` on the part's device, or None where they are all there are, in order."""
    packing, length = part.spec.packing, part.shape[dim]
    length *= packing.count if packing and packing.dim == dim - 2 else 1
    same = len(places) == length and torch.equal(places, torch.arange(length))
    return None if same else places.to(part.values.device)


def _indices(ranges: Ranges) -> Tensor:
    if not ranges:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])
