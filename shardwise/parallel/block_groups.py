"""Integers in groups, as AWQ, GPTQ and compressed-tensors have them, for the layers of `block_linear`, on the CPU.

A group of inputs has one scale and one zero point for each output, as a block of GGUF's has; groups may be longer. What
has one scale for all inputs of an output takes it for groups of as many inputs as the kernel allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.parallel.block_linear import ROWS, Affine, halves_of
from shardwise.parallel.dequantise import CodedMatrix, Part, Ranges
from shardwise.parallel.storage import FLOATS
from shardwise.parallel.weights import Weights
from shardwise.sharding.axes import span
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.spec import Block, Moe
from shardwise.sharding.tensors import TensorSpec

GROUPS = (256, 128, 64, 32)
"""Inputs that the kernel takes with one scale."""
_DEQUANTISED = ("kv_b", "head")
"""Roles whose weight is taken apart for attention to latents, or whose products choose between close numbers."""


@dataclass(frozen=True)
class Grouped:
    """A weight's form, as far as its tensors tell."""

    bits: int
    """4 or 8."""
    group: int
    """Inputs that share a scale; 0: all."""

    @classmethod
    def of(cls, block: Block, role: str) -> "Grouped | None":
        """None for a weight of another form, or whose inputs are not in the order of their groups."""
        weight, scale = block.roles[f"{role}.weight"], block.roles.get(f"{role}.scale")
        index = block.roles.get(f"{role}.group_index")
        if scale is None or scale.dtype not in FLOATS or len(weight.dims) != 2 or role in _DEQUANTISED:
            return None
        if index is not None and not index.optional:
            return None
        if weight.dtype == "I8":
            bits = 8
        elif weight.dtype == "I32" and weight.packing is not None and weight.packing.bits in (4, 8):
            bits = weight.packing.bits
        else:
            return None
        inputs = scale.dims[0 if scale.transposed else 1] if len(scale.dims) == 2 else None
        group = inputs.per if inputs is not None and inputs.length > 1 else 0
        return cls(bits, group) if group in (0, *GROUPS) else None

    def length(self, columns: Ranges) -> int:
        """Of the groups in which a rank's inputs are multiplied; 0 where they cannot be."""
        if self.group:
            return self.group if all(bound % self.group == 0 for each in columns for bound in each) else 0
        return next((group for group in GROUPS if span(columns) % group == 0), 0)

    def held_bytes(self, weight: TensorSpec, values: Sequence[tuple[Ranges, int]]) -> int:
        """Of codes, and of a scale and a zero in bfloat16 for each group of each 4-bit matrix; 0 where it cannot stay.

        values  what `Cuts.values` says of a rank
        """
        (_, rows), (columns, count) = reversed(values) if weight.transposed else values
        length = 0 if rows % ROWS else self.length(columns)
        return rows * (count * self.bits // 8 + self.bits * count // length) if length else 0


def grouped_weights(model: ModelSpec) -> dict[TensorSpec, Grouped]:
    """The linear weights of a model that have such a form."""
    found = {}
    for layer, _ in model.layer_groups():
        shared = [moe.shared for moe in layer.feed_forward if isinstance(moe, Moe) and moe.shared is not None]
        for block in (*layer.mixers, *layer.feed_forward, *shared):
            for role in [name.removesuffix(".weight") for name in block.roles if name.endswith(".weight")]:
                form = Grouped.of(block, role)
                if form is not None and not block.roles[f"{role}.weight"].experts:
                    found[block.roles[f"{role}.weight"]] = form
    return found


def grouped_planes(weights: Weights, block: Block, *roles: str, layer: int | None = None) -> list[Affine] | None:
    """These roles' weights as 4-bit matrices whose sum they are, joined along the outputs.

    None unless weights stay in their form, and all of these have the same one of groups that the kernel takes, cut at
    whole groups, with a multiple of ROWS rows. CheckpointError for inputs in another order than the config says.
    """
    if not weights.native:
        return None
    forms = [Grouped.of(block, role) for role in roles]
    ranges = [weights.value_ranges(block, role) for role in roles]
    lengths = {form.length(columns) if form else 0 for form, (_, columns) in zip(forms, ranges, strict=True)}
    shapes = [weights.linear_shape(block, role) for role in roles]
    padded = any(shape != tuple(map(span, held)) for shape, held in zip(shapes, ranges, strict=True))
    if 0 in lengths or len(set(forms)) > 1 or len(lengths) > 1 or padded or sum(rows for rows, _ in shapes) % ROWS:
        return None
    form, length = forms[0], lengths.pop()
    assert form is not None
    matrices = [
        _affine(weights.parts(block, role, layer), *held, form.bits, length)
        for role, held in zip(roles, ranges, strict=True)
    ]
    if len(matrices) == 1:
        return matrices[0]
    return [_joined(same_plane) for same_plane in zip(*matrices, strict=True)]


def _affine(parts: Mapping[str, Part], rows: Ranges, columns: Ranges, bits: int, length: int) -> list[Affine]:
    matrix = CodedMatrix(parts, rows, columns)
    if not torch.equal(matrix.groups, _in_order(matrix, length)):
        raise CheckpointError(
            f"{parts['weight'].spec.name}: rows are not in the order of their groups, though the config says so: set "
            "desc_act to true in its quantization_config"
        )
    codes = matrix.codes.rows(slice(0, matrix.shape[0]))
    codes = codes.t() if matrix.turned else codes
    offset = 128 if parts["weight"].spec.dtype == "I8" else 0
    groups = (len(codes), codes.shape[1] // length)
    scale = matrix.scale.outputs_first().expand(groups)
    zero = torch.tensor(matrix.codes.middle) if matrix.zero is None else matrix.zero.outputs_first()
    zero = ((8 if bits == 4 else 128) - offset - zero) * scale
    whole = (codes + offset).to(torch.int32)
    return [(whole, scale, zero)] if bits == 4 else halves_of(whole, scale, zero)


def _in_order(matrix: CodedMatrix, length: int) -> Tensor:
    inputs = torch.arange(len(matrix.groups))
    return inputs // length if matrix.scale.outputs_first().shape[1] > 1 else torch.zeros_like(inputs)


def _joined(planes: tuple[Affine, ...]) -> Affine:
    codes, scales, zeros = (torch.cat(each) for each in zip(*planes, strict=True))
    return codes, scales, zeros
