"""Which forms of stored weights the runtime reads. Needs no torch."""

from shardwise.sharding import spec
from shardwise.sharding.checkpoint.header import STORAGE
from shardwise.sharding.model import ModelSpec
from shardwise.sharding.tensors import TensorSpec

GGUF_BLOCK = 32
"""Elements in a block of GGUF's types at least; those of safetensors files have one or two."""
FLOATS = ("F64", "F32", "F16", "BF16")
EXPONENTS = ("U8", "F8_E8M0")
"""Of scales that are powers of two, stored as biased exponents."""
_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_PACKED_CODES = ("I32", "U8", "I8")
_SCALES = (*FLOATS, *EXPONENTS, "F8_E4M3")
_READ = (
    "plain floats, float8 and int8 with scales, 4-bit floats in pairs (NVFP4, MXFP4), integers in 32-bit words (AWQ, "
    "GPTQ, compressed-tensors), and GGUF's types"
)
_INPUT_FACTORS = (".act.scales", ".pre_quant_scale")
"""Names of factors on a layer's input, which AWQ leaves beside the weights where no layer before can take them."""


def not_read(block: spec.Block) -> str:
    """What of a block's weights has a form that is not read, and which forms are; empty if all are read."""
    roles = {tensor.role: tensor for tensor in (block.all_tensors if isinstance(block, spec.Moe) else block.tensors)}
    for role, tensor in roles.items():
        base, _, part = role.rpartition(".")
        scale = roles.get(f"{base}.scale")
        if part == "weight" and not _is_read(tensor, scale):
            scaled = f" with scales of {scale.dtype}" if scale else ""
            return (
                f"{tensor.name} is stored as {tensor.dtype}{scaled}, which the runtime does not read; it reads {_READ}"
            )
    return ""


def factors_of_inputs(model: ModelSpec) -> str:
    """The first tensor of a checkpoint that scales a layer's input; empty if there is none."""
    names = [tensor.name for extra in model.extras for tensor in extra.tensors]
    return next((name for name in names if name.endswith(_INPUT_FACTORS)), "")


def left_out(model: ModelSpec) -> str:
    """Tensors of a checkpoint that its architecture has no place for, as `plan` tells them; empty if there are none."""
    notes = "; ".join(extra.note for extra in model.extras if extra.name == "other")
    return f"left out, being no part of {model.architecture}: {notes}" if notes else ""


def _is_read(weight: TensorSpec, scale: TensorSpec | None) -> bool:
    if scale is None:
        return weight.dtype in FLOATS or STORAGE[weight.dtype][0] >= GGUF_BLOCK
    return weight.dtype in (_PACKED_CODES if weight.packing else _CODES) and scale.dtype in _SCALES
