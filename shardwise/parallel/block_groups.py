"""Integers in groups, as AWQ, GPTQ and compressed-tensors have them, for the layers of `block_linear`, on the CPU.

A group is what a block of GGUF's is, but may be longer. What has one scale for all inputs of an output takes it for
groups of as many inputs as the kernel allows.
"""

from collections.abc import Mapping, Sequence

import torch

from shardwise.parallel.block_linear import ROWS, Affine, halves_of
from shardwise.parallel.dequantise import CodedMatrix, Part, Ranges
from shardwise.parallel.grouped import Grouped, Joined, require_order
from shardwise.parallel.weights import Weights
from shardwise.sharding.axes import span
from shardwise.sharding.spec import Block
from shardwise.sharding.tensors import TensorSpec


def held_bytes(form: Grouped, weight: TensorSpec, values: Sequence[tuple[Ranges, int]]) -> int:
    """Of codes, and of a scale and a zero in bfloat16 for each group of each 4-bit matrix; 0 where it cannot stay.

    values  what `Cuts.values` says of a rank
    """
    (_, rows), (columns, count) = reversed(values) if weight.transposed else values
    length = 0 if rows % ROWS else form.length(columns)
    return rows * (count * form.bits // 8 + form.bits * count // length) if length else 0


def grouped_planes(weights: Weights, block: Block, *roles: str, layer: int | None = None) -> list[Affine] | None:
    """These roles' weights as 4-bit matrices whose sum they are, joined along the outputs.

    None unless weights stay in their form, and all of these have the same one of groups that the kernel takes, cut at
    whole groups, with a multiple of ROWS rows. CheckpointError for inputs in another order than the config says.
    """
    if not weights.native:
        return None
    joined = Joined.of(weights, block, roles)
    if joined is None or sum(span(rows) for rows, _ in joined.ranges) % ROWS:
        return None
    matrices = [
        _affine(weights.parts(block, role, layer), *held, joined.form.bits, joined.length)
        for role, held in zip(roles, joined.ranges, strict=True)
    ]
    if len(matrices) == 1:
        return matrices[0]
    return [_joined(same_plane) for same_plane in zip(*matrices, strict=True)]


def _affine(parts: Mapping[str, Part], rows: Ranges, columns: Ranges, bits: int, length: int) -> list[Affine]:
    matrix = CodedMatrix(parts, rows, columns)
    require_order(matrix, length, parts["weight"].spec.name)
    codes = matrix.codes.rows(slice(0, matrix.shape[0]))
    codes = codes.t() if matrix.turned else codes
    offset = 128 if parts["weight"].spec.dtype == "I8" else 0
    groups = (len(codes), codes.shape[1] // length)
    scale = matrix.scale.outputs_first().expand(groups)
    zero = torch.tensor(matrix.codes.middle) if matrix.zero is None else matrix.zero.outputs_first()
    zero = ((8 if bits == 4 else 128) - offset - zero) * scale
    whole = (codes + offset).to(torch.int32)
    return [(whole, scale, zero)] if bits == 4 else halves_of(whole, scale, zero)


def _joined(planes: tuple[Affine, ...]) -> Affine:
    codes, scales, zeros = (torch.cat(each) for each in zip(*planes, strict=True))
    return codes, scales, zeros
