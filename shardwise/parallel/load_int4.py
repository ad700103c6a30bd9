"""Loads 4-bit integers in groups that stay so on a GPU, where a rank's part of them is made of whole groups."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shardwise.ops.quantization import int4_weight
from shardwise.ops.quantization.int4_weight import GROUPS, SCALES, SLAB, Int4Stack, Int4Weight, pack_int4
from shardwise.parallel.dequantise import PIECE_VALUES, CodedMatrix, Part, Ranges
from shardwise.parallel.grouped import Grouped, Joined, require_order
from shardwise.parallel.weight_form import int4_experts, int4_forms, moe_blocks, stays_int4
from shardwise.parallel.weights import Weights
from shardwise.sharding.axes import span
from shardwise.sharding.plan import Plan
from shardwise.sharding.spec import Block, Moe
from shardwise.sharding.tensors import TensorSpec

_SCALE_TYPES = dict(zip(("F16", "BF16"), SCALES, strict=True))
LONGEST = max(GROUPS)
"""Longer groups, and whole rows, become several of as many inputs."""
STACK_VALUES = {"cpu": PIECE_VALUES["cpu"], "cuda": 1 << 26}
"""Of experts whose codes are unpacked at once. One expert is little work for a GPU: its launches take longer."""


def int4_weights(
    weights: Weights, block: Block, *roles: str, layer: int | None, order: Tensor | None = None
) -> Int4Weight | None:
    """The roles' weights, joined along the outputs, or in `order`.

    None where one does not stay in 4 bits, some group is cut, or something is padded or empty. CheckpointError for
    inputs in another order than the config says.
    """
    if not weights.keeps_int4 or not all(stays_int4(role, Grouped.of(block, role)) for role in roles):
        return None
    joined = Joined.of(weights, block, roles)
    if joined is None or not all(span(rows) and span(columns) for rows, columns in joined.ranges):
        return None
    found = [
        _loaded(weights.parts(block, role, layer), *held, joined)
        for role, held in zip(roles, joined.ranges, strict=True)
    ]
    parts = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*found, strict=True)]
    codes, scales, zeros = parts if order is None else [part[order] for part in parts]
    return pack_int4(codes, scales, zeros)


def int4_stacks(weights: Weights, block: Moe, layer: int, local: Sequence[int]) -> tuple[Int4Stack, Int4Stack] | None:
    """(up and gate rows [E, 2I, H], down [E, H, I]) of the experts `local`; None where `stays` says no.

    CheckpointError as `int4_weights`.
    """
    if not weights.keeps_int4 or not local or not stays(weights.plan, weights.rank, block):
        return None

    def stack(*roles: str) -> Int4Stack:
        joined = Joined.of(weights, block, roles)
        assert joined is not None
        found = []
        for some in _batches(local, joined, weights.device):
            held = zip(roles, joined.ranges, strict=True)
            loaded = [_loaded(weights.stacked_parts(block, role, layer, some), *each, joined) for role, each in held]
            found.append([torch.cat(each, 1).flatten(0, 1) for each in zip(*loaded, strict=True)])
        codes, scales, zeros = (torch.cat(each) for each in zip(*found, strict=True))
        return Int4Stack(pack_int4(codes, scales, zeros), len(local))

    return stack("up", "gate"), stack("down")


def _batches(local: Sequence[int], joined: Joined, device: torch.device) -> Iterator[Sequence[int]]:
    values = max(span(rows) * span(columns) for rows, columns in joined.ranges)
    count = max(1, STACK_VALUES[device.type] // values)
    return (local[first : first + count] for first in range(0, len(local), count))


def stays(made: Plan, rank: int, block: Moe) -> bool:
    """Whether a rank's part of a block's experts stays in 4 bits: it does where it has whole groups and slabs."""
    at, forms = made.layout.coordinates(rank), int4_experts(block)
    values = {weight: made.cuts.values(weight, at) for weight in forms}
    outputs = (each[-1 if weight.transposed else -2][1] for weight, each in values.items())
    whole = all(count % SLAB == 0 for count in outputs)
    return bool(forms) and whole and all(held_bytes(form, weight, values[weight]) for weight, form in forms.items())


def held_forms(made: Plan, rank: int) -> dict[TensorSpec, Grouped]:
    """The weights that may stay in 4 bits on a rank, those of experts only where they do."""
    cut = [weight for block in moe_blocks(made.model) if not stays(made, rank, block) for weight in int4_experts(block)]
    return {weight: form for weight, form in int4_forms(made.model).items() if weight not in cut}


def held_bytes(form: Grouped, weight: TensorSpec, values: Sequence[tuple[Ranges, int]]) -> int:
    """What a weight takes that stays in 4 bits; 0 where it cannot stay.

    values  what `Cuts.values` says of a rank
    """
    (rows, most), (columns, count) = reversed(values) if weight.transposed else values
    stays = span(rows) == most and span(columns) == count and count
    length = form.length(columns) if stays else 0
    return int4_weight.held_bytes(most, count, min(length, LONGEST)) if length else 0


def _loaded(parts: Mapping[str, Part], rows: Ranges, columns: Ranges, joined: Joined) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [.., out, in], scales and zero points uint8 [.., out, groups] of at most LONGEST inputs."""
    matrix = CodedMatrix(parts, rows, columns)
    require_order(matrix, joined.length, parts["weight"].spec.name)
    codes = torch.empty(*matrix.lead, *matrix.shape, dtype=torch.uint8, device=parts["weight"].values.device)
    step = max(1, PIECE_VALUES[codes.device.type] // max(1, prod(matrix.lead) * matrix.shape[1]))
    for first in range(0, matrix.shape[0], step):
        piece = slice(first, min(first + step, matrix.shape[0]))
        codes[..., piece, :] = matrix.codes.rows(piece)
    codes = codes.mT if matrix.turned else codes
    times, groups = joined.length // min(joined.length, LONGEST), (codes.shape[-2], codes.shape[-1] // joined.length)

    def spread(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.expand(*matrix.lead, *groups).repeat_interleave(times, -1).to(dtype)

    zeros = codes.new_full((1, 1), int(matrix.codes.middle)) if matrix.zero is None else matrix.zero.outputs_first()
    scales = spread(matrix.scale.outputs_first(), _SCALE_TYPES[joined.form.scale])
    return codes, scales, spread(zeros, torch.uint8)
