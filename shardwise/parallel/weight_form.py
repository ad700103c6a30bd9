"""Whether quantised weights stay in their form on a device, and why."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shardwise.ops.linear import int4
from shardwise.ops.quantization.float8 import TILE
from shardwise.parallel.grouped import Grouped, grouped_weights
from shardwise.parallel.layers import activation_named
from shardwise.parallel.options import WEIGHT_FORMS, require_known
from shardwise.parallel.storage import FLOATS
from shardwise.sharding import spec
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.tensors import TensorSpec


@dataclass(frozen=True)
class WeightForm:
    """How weights are held."""

    native_blocks: bool
    """GGUF blocks stay, on the CPU."""
    packs_mxfp4: bool
    """MXFP4 experts stay, on a GPU."""
    reason: str
    keeps_float8: bool = False
    """Float8 weights stay, on a GPU, where a layer takes them."""
    keeps_int4: bool = False
    """4-bit integers in groups stay, on a GPU, where a layer takes them."""

    @classmethod
    def choose(
        cls, wanted: str, model: ModelSpec, dtype: torch.dtype, device: torch.device, *, kernels: bool
    ) -> "WeightForm":
        """`wanted`: one of WEIGHT_FORMS. ValueError for another word, or when native has no layer for this model.

        kernels  layers are those of a GPU, on a GPU or in Triton's interpreter
        """
        require_known("weights", wanted, WEIGHT_FORMS)
        name, plain = str(dtype).removeprefix("torch."), model.quantization == "none"
        if wanted == "dequantised":
            return cls(False, False, f"{name}, asked for by name")
        if not kernels:
            if wanted == "native":
                return cls(True, False, "as stored where a layer takes it, asked for by name")
            return cls(False, False, name if plain else f"{name} (weights native keeps packed what a layer takes)")
        grains, groups = _float8_grains(model), _int4_groups(model)
        kept = grains or groups
        against = _against_type(dtype, device) if kept else _against_packing(model, dtype, device)
        if groups and not against:
            against = int4.reason_against(device)
        if wanted == "native" and against:
            raise ValueError(f"weights native: {against}; use weights auto")
        if against:
            return cls(False, False, name if plain else f"{name}, dequantised: {against}")
        if kept:
            forms = [f"float8 with scales of {' and '.join(_GRAINS[grain] for grain in grains)}"] if grains else []
            forms += [f"4-bit integers with scales of {' and '.join(groups)}"] if groups else []
            reason = f"{', '.join(forms)}, the rest {name}"
            return cls(False, False, reason, keeps_float8=bool(grains), keeps_int4=bool(groups))
        return cls(False, True, f"experts MXFP4, the rest {name}")


def _against_packing(model: ModelSpec, dtype: torch.dtype, device: torch.device) -> str:
    reasons = {_against_experts(block) for block in moe_blocks(model)} or {"the model has no experts"}
    if "" not in reasons:
        return f"{_KEPT}, and {sorted(reasons)[0]}"
    if dtype != torch.bfloat16 and device.type == "cuda":
        return f"MXFP4 experts multiply with bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""


def _against_experts(block: spec.Moe) -> str:
    stored = block.roles.get("gate_up.scale")
    if not block.stacked or stored is None or stored.dtype != "U8":
        return "these weights are stored otherwise"
    if not block.gate_up_interleaved or block.limit is None:
        return "these are not of gpt-oss' form, gate and up rows in turn with a clamped activation"
    return ""


def stays_packed(block: spec.Moe) -> bool:
    """Whether a block's experts are MXFP4 of the form that the kernels take."""
    return not _against_experts(block)


_GRAINS = {"tiles": "128 x 128 tiles", "channels": "output channels", "tensors": "tensors"}
EXPERT_ROLES = ("up", "gate", "down")
"""Of experts that are stored one by one."""
_PLAIN_ROLES = {"kv_b", "router", "head", "shared_gate"}
"""Dequantised always: the first is taken apart and turned for attention to latents, the others are small or kept as
they are by every checkpoint."""


_KEPT = (
    "GPUs keep float8, 4-bit integers in the order of their groups, of 32, 64, 128 or 256 inputs or whole rows with "
    "16-bit scales, and MXFP4 experts only"
)


def _against_type(dtype: torch.dtype, device: torch.device) -> str:
    if dtype == torch.float32 and device.type == "cuda":
        return "float8 and 4-bit weights multiply with 16-bit floats, not float32"
    return ""


def stays_int4(role: str, form: Grouped | None) -> bool:
    """Whether a weight of this form is one that kernels take: 4-bit integers in groups with scales of 16 bits."""
    return form is not None and form.bits == 4 and form.scale in ("F16", "BF16") and role not in _PLAIN_ROLES


def int4_forms(model: ModelSpec) -> dict[TensorSpec, Grouped]:
    """The weights of a model that may stay in 4 bits on a GPU."""
    found = grouped_weights(model).items()
    linear = {weight: form for weight, form in found if stays_int4(weight.role.removesuffix(".weight"), form)}
    return linear | {weight: form for block in moe_blocks(model) for weight, form in int4_experts(block).items()}


def moe_blocks(model: ModelSpec) -> list[spec.Moe]:
    return [block for layer, _ in model.layer_groups() for block in layer.feed_forward if isinstance(block, spec.Moe)]


def int4_experts(block: spec.Moe) -> dict[TensorSpec, Grouped]:
    """The weights of a block's experts, of up, gate and down rows, that may stay in 4 bits: all or none."""
    if block.stacked or not block.gated or block.limit is not None or activation_named(block.activation) is not F.silu:
        return {}
    forms = {role: Grouped.of(block, role) for role in EXPERT_ROLES}
    found = {block.roles[f"{role}.weight"]: form for role, form in forms.items() if form and stays_int4(role, form)}
    return found if len(found) == len(EXPERT_ROLES) and forms["up"] == forms["gate"] else {}


def _int4_groups(model: ModelSpec) -> list[str]:
    """What scales of 4-bit integers that stay so stand for."""
    groups = sorted({form.group for form in int4_forms(model).values()})
    return [f"groups of {group}" if group else "whole rows" for group in groups]


def _float8_grains(model: ModelSpec) -> list[str]:
    """What scales of weights that stay float8 stand for."""
    blocks = [block for layer, _ in model.layer_groups() for block in (*layer.mixers, *layer.feed_forward)]
    roles = [(block, role.removesuffix(".weight")) for block in blocks for role in block.roles]
    grains = {float8_grain(*each) for each in roles if stays_float8(*each)}
    return [grain for grain in _GRAINS if grain in grains]


def stays_float8(block: spec.Block, role: str) -> bool:
    """Whether a weight is of the form that kernels take: e4m3 [out, in] with float scales of a grain that they know."""
    weight = block.roles.get(f"{role}.weight")
    return weight is not None and keeps_as_float8(weight) and float8_grain(block, role) != ""


def keeps_as_float8(weight: TensorSpec) -> bool:
    """As `stays_float8`, as far as the weight alone tells."""
    role, _, part = weight.role.rpartition(".")
    is_matrix = len(weight.dims) == 2 and not weight.transposed
    return part == "weight" and weight.dtype == "F8_E4M3" and is_matrix and role not in _PLAIN_ROLES


def float8_grain(block: spec.Block, role: str) -> str:
    """What one scale stands for: tiles, channels or tensors; empty for others, and where there are zero points."""
    weight, scale = block.roles[f"{role}.weight"], block.roles.get(f"{role}.scale")
    if scale is None or scale.dtype not in FLOATS or f"{role}.zeros" in block.roles:
        return ""
    if all(length == 1 for length in scale.shape):
        return "tensors"
    if scale.shape == (weight.shape[0], 1):
        return "channels"
    return "tiles" if tuple(dim.per for dim in scale.dims) == (TILE, TILE) else ""
