"""Integers in groups, as AWQ, GPTQ and compressed-tensors have them: which weights, and how a rank may hold its part.

A group of inputs has one scale and one zero point for each output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardwise.parallel.dequantise import CodedMatrix, Ranges
from shardwise.parallel.storage import FLOATS
from shardwise.parallel.weights import Weights
from shardwise.sharding.axes import span
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.spec import Block, Moe
from shardwise.sharding.tensors import TensorSpec

GROUPS = (256, 128, 64, 32)
"""Inputs that kernels take with one scale."""
_DEQUANTISED = ("kv_b", "head")
"""Roles whose weight is taken apart for attention to latents, or whose products choose between close numbers."""


@dataclass(frozen=True)
class Grouped:
    """A weight's form, as far as its tensors tell."""

    bits: int
    """4 or 8."""
    group: int
    """Inputs that share a scale; 0: all."""
    scale: str
    """Storage type of the scales."""

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
        return cls(bits, group, scale.dtype) if group in (0, *GROUPS) else None

    def length(self, columns: Ranges) -> int:
        """Of the groups in which a rank's inputs are multiplied; 0 where they cannot be."""
        if self.group:
            return self.group if all(bound % self.group == 0 for each in columns for bound in each) else 0
        return next((group for group in GROUPS if span(columns) % group == 0), 0)


def grouped_weights(model: ModelSpec) -> dict[TensorSpec, Grouped]:
    """The linear weights of a model that have such a form, but for those of experts."""
    found = {}
    for layer, _ in model.layer_groups():
        shared = [moe.shared for moe in layer.feed_forward if isinstance(moe, Moe) and moe.shared is not None]
        for block in (*layer.mixers, *layer.feed_forward, *shared):
            for role in [name.removesuffix(".weight") for name in block.roles if name.endswith(".weight")]:
                form = Grouped.of(block, role)
                if form is not None and not block.roles[f"{role}.weight"].experts:
                    found[block.roles[f"{role}.weight"]] = form
    return found


@dataclass(frozen=True)
class Joined:
    """A rank's parts of some weights of the same form, to become one matrix."""

    form: Grouped
    length: int
    """Of the groups in which they are multiplied."""
    ranges: Sequence[tuple[Ranges, Ranges]]
    """Outputs and inputs of each."""

    @classmethod
    def of(cls, weights: Weights, block: Block, roles: Sequence[str]) -> "Joined | None":
        """None where forms differ, one is none of groups, a group is cut, or something is padded."""
        forms = {Grouped.of(block, role) for role in roles}
        ranges = [weights.value_ranges(block, role) for role in roles]
        form = forms.pop()
        if form is None or forms:
            return None
        lengths = {form.length(columns) for _, columns in ranges}
        shapes = [weights.linear_shape(block, role) for role in roles]
        padded = any(shape != tuple(map(span, held)) for shape, held in zip(shapes, ranges, strict=True))
        return None if padded or len(lengths) > 1 or 0 in lengths else cls(form, lengths.pop(), ranges)


def require_order(matrix: CodedMatrix, length: int, name: str) -> None:
    """CheckpointError for the weight `name` whose inputs are in another order than the config says."""
    inputs = torch.arange(len(matrix.groups))
    alone = matrix.scale.outputs_first().shape[-1] == 1
    if not torch.equal(matrix.groups, torch.zeros_like(inputs) if alone else inputs // length):
        raise CheckpointError(
            f"{name}: rows are not in the order of their groups, though the config says so: set desc_act to true in "
            "its quantization_config"
        )
