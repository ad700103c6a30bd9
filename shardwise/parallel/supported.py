"""What the runtime has no layer for, found before a byte is loaded."""

from shardwise.sharding import spec


class UnsupportedModel(ValueError):
    """The planner describes this model, but the runtime has no layer for one of its blocks."""


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


def check_supported(model: spec.ModelSpec, *, mixers: tuple[type, ...], feed_forwards: tuple[type, ...]) -> None:
    """UnsupportedModel unless every block is of these types and its options have an implementation."""
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
            if isinstance(block, spec.Moe):
                _check_options(model, block.routing, where)


def _check_structure(model: spec.ModelSpec, layer: spec.Layer, where: str) -> None:
    if len(layer.mixers) != 1 or len(layer.feed_forward) != 1 or layer.others or layer.parallel_residual:
        raise UnsupportedModel(
            f"{model.architecture}, {where}: the runtime needs one mixer and then one feed-forward, here are "
            f"{len(layer.mixers)} mixers, {len(layer.feed_forward)} feed-forwards and {len(layer.others)} other blocks"
        )
    if layer.mixer_norm is None or layer.feed_forward_norm is None:
        raise UnsupportedModel(f"{model.architecture}, {where}: blocks without a norm before them are not supported")


def _check_options(model: spec.ModelSpec, block: spec.Block | spec.Routing, where: str) -> None:
    for name, legal in _LEGAL.get(type(block), {}).items():
        value = getattr(block, name)
        if value not in legal:
            option = f"{type(block).__name__}.{name}"
            raise UnsupportedModel(f"{model.architecture}, {where}: {option} = {value!r}; the runtime supports {legal}")
