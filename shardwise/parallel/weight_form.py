"""Whether quantised weights stay in their form on a device, and why."""

from dataclasses import dataclass

import torch

from shardwise.parallel.options import WEIGHT_FORMS, require_known
from shardwise.sharding import spec
from shardwise.sharding.model import ModelSpec


@dataclass(frozen=True)
class WeightForm:
    """How weights are held."""

    native_blocks: bool
    """GGUF blocks stay, on the CPU."""
    packs_mxfp4: bool
    """MXFP4 experts stay, on a GPU."""
    reason: str

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
            return cls(False, False, name if plain else f"{name}, dequantised: weights auto on the CPU")
        against = _against_packing(model, dtype, device)
        if wanted == "native" and against:
            raise ValueError(f"weights native: {against}; use weights auto")
        if against:
            return cls(False, False, name if plain else f"{name}, dequantised: {against}")
        return cls(False, True, f"experts MXFP4, the rest {name}")


def _against_packing(model: ModelSpec, dtype: torch.dtype, device: torch.device) -> str:
    blocks = [block for layer, _ in model.layer_groups() for block in layer.feed_forward]
    reasons = {_against_experts(b) for b in blocks if isinstance(b, spec.Moe)} or {"the model has no experts"}
    if "" not in reasons:
        return f"GPUs keep MXFP4 experts only, and {sorted(reasons)[0]}"
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
