"""What the runtime has no layer for, found before a byte is loaded."""

from shardwise.sharding import spec
from shardwise.sharding.checkpoint.reader import NUMPY
from shardwise.sharding.families import ARCHITECTURES
from shardwise.sharding.model import Layer, ModelSpec


class UnsupportedModel(ValueError):
    """The planner describes this model, but the runtime has no layer for one of its blocks."""


_FLOATS = {"F64", "F32", "F16", "BF16"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2"}

# Options with the values that have an implementation; fields that are not listed are all implemented.
_LEGAL: dict[type, dict[str, tuple]] = {
    spec.Attention: {
        "chunk": (None,),
        "qk_norm": (None, "head"),
        "qk_norm_after_rope": (False,),
        "qk_norm_weighted": (True,),
        "v_norm": (False,),
        "output_gate": (None,),
        "k_is_v": (False,),
        "value_scale": (1.0,),
        "key_multiplier": (1.0,),
        "qk_clip": (None,),
        "temperature": (None,),
        "alibi": (False,),
        "in_multiplier": (1.0,),
        "out_multiplier": (1.0,),
        "qkv_grouped": (False,),
        "index_heads": (0,),
    },
    spec.DenseMlp: {
        "gate_up_interleaved": (False,),
        "limit": (None,),
        "alpha": (None,),
        "gate_multiplier": (1.0,),
        "down_multiplier": (1.0,),
    },
    spec.Moe: {"gated": (True,), "latent": (0,)},
    spec.Routing: {"scores_scale_input": (False,), "hash_layer": (False,)},
    spec.Norm: {"kind": ("rms",)},
    spec.Embedding: {"learned_positions": (0,)},
}


def check_supported(model: ModelSpec, *, mixers: tuple[type, ...], feed_forwards: tuple[type, ...]) -> None:
    """UnsupportedModel unless every block is of these types, its options have an implementation and its weights a form
    that can be read."""
    if model.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{model.architecture} can be planned but not run, since no family describes it: {'; '.join(model.notes)}"
        )
    _check_options(model, model.embedding, "embedding")
    _check_options(model, model.final_norm, "final norm")
    for layer, numbers in model.layer_groups():
        where = f"layer {numbers[0]}"
        _check_structure(model, layer, where)
        kinds = [type(b) for b in (*layer.mixers, *layer.feed_forward)]
        if kinds[0] not in mixers or kinds[1] not in feed_forwards:
            known = ", ".join(t.__name__ for t in (*mixers, *feed_forwards))
            raise UnsupportedModel(
                f"{model.architecture}, {where}: blocks {[t.__name__ for t in kinds]}, the runtime has {known}"
            )
        for block in layer.blocks:
            _check_options(model, block, where)
            _check_storage(model, block, where)
            if isinstance(block, spec.Moe):
                _check_options(model, block.routing, where)


def _check_structure(model: ModelSpec, layer: Layer, where: str) -> None:
    if len(layer.mixers) != 1 or len(layer.feed_forward) != 1 or layer.others or layer.parallel_residual:
        raise UnsupportedModel(
            f"{model.architecture}, {where}: the runtime needs one mixer and then one feed-forward, here are "
            f"{len(layer.mixers)} mixers, {len(layer.feed_forward)} feed-forwards and {len(layer.others)} other blocks"
        )
    if layer.mixer_norm is None or layer.feed_forward_norm is None:
        raise UnsupportedModel(f"{model.architecture}, {where}: blocks without a norm before them are not supported")


def _check_options(model: ModelSpec, block: spec.Block | spec.Routing, where: str) -> None:
    for name, legal in _LEGAL.get(type(block), {}).items():
        value = getattr(block, name)
        if value not in legal:
            option = f"{type(block).__name__}.{name}"
            raise UnsupportedModel(f"{model.architecture}, {where}: {option} = {value!r}; the runtime supports {legal}")


def _check_storage(model: ModelSpec, block: spec.Block, where: str) -> None:
    roles = {tensor.role: tensor for tensor in (block.all_tensors if isinstance(block, spec.Moe) else block.tensors)}
    for role, tensor in roles.items():
        base, _, part = role.rpartition(".")
        scale = roles.get(f"{base}.scale")
        if part in ("zeros", "group_index", "global_scale") or (part == "weight" and not _is_read(tensor, scale)):
            scaled = f" with scales of {scale.dtype}" if scale else ""
            raise UnsupportedModel(
                f"{model.architecture}, {where}: {tensor.name} is stored as {tensor.dtype}{scaled} "
                f"({model.quantization}), which the runtime does not read; it reads plain floats, float8 with float "
                "scales, MXFP4 blocks as gpt-oss has them, and GGUF's types"
            )


def _is_read(weight: spec.TensorSpec, scale: spec.TensorSpec | None) -> bool:
    if weight.dtype in _FLOAT8:
        return scale is not None and scale.dtype in _FLOATS
    if weight.dtype == "U8":  # blocks have one dimension more, of the 16 bytes that hold 32 codes
        return scale is not None and scale.dtype == "U8" and len(weight.dims) == len(scale.dims) + 1
    return weight.dtype in _FLOATS or weight.dtype not in NUMPY
