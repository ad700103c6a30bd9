"""What the runtime has no layer for, found before a rank starts or a byte is loaded."""

from dataclasses import fields

from shardwise.parallel.storage import factors_of_inputs, not_read
from shardwise.sharding import spec
from shardwise.sharding.families import ARCHITECTURES
from shardwise.sharding.model import Layer, ModelSpec


class UnsupportedModel(ValueError):
    """The planner describes this model, but the runtime has no layer for one of its blocks."""


MIXERS: tuple[type[spec.Block], ...] = (spec.Attention, spec.MlaAttention, spec.Mamba2, spec.GatedDelta)
STATEFUL = (spec.Mamba2, spec.GatedDelta)
FEED_FORWARDS: tuple[type[spec.Block], ...] = (spec.DenseMlp, spec.Moe)
ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "longrope": ("short_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embedding, with the fields without which they cannot be computed."""
SCALED_QUERIES = "llama_4_scaling_beta"
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")

_EVERY: dict[type, set[str]] = {
    spec.Embedding: {"vocab", "multiplier"},
    spec.Head: {"tied", "softcap", "multiplier"},
    spec.Norm: {"kind", "eps", "weight_offset"},
    spec.Rope: {"theta", "dim", "scaling", "interleaved"},
    spec.Attention: {"q_axis", "kv_axis", "head_dim", "v_head_dim", "scale", "rope", "window", "softcap", "sinks"}
    | {"norm_eps", "norm_weight_offset", "qk_norm_after_rope", "key_multiplier", "in_multiplier", "out_multiplier"},
    spec.MlaAttention: {"q_axis", "q_rank", "kv_rank", "nope_dim", "rope_dim", "v_head_dim", "scale", "rope"}
    | {"norm_eps"},
    spec.Mamba2: {"head_axis", "group_axis", "head_dim", "state", "conv_kernel", "conv_bias", "norm_before_gate"}
    | {"norm_groups", "norm_eps", "chunk", "dt_limits", "gated_norm"}
    | {"in_multiplier", "out_multiplier", "segment_multipliers"},
    spec.GatedDelta: {"k_axis", "v_axis", "k_head_dim", "v_head_dim", "conv_kernel", "norm_eps"},
    spec.DenseMlp: {"mlp_axis", "gated", "gate_multiplier", "down_multiplier"},
    spec.Moe: {"expert_axis", "mlp_axis", "routing", "stacked", "transposed", "gate_up_interleaved", "limit", "alpha"}
    | {"shared", "shared_gated", "gated", "latent"},
    spec.Routing: {"top_k", "softmax_after_topk", "normalize", "bias_correction", "groups", "top_groups", "group_score"}
    | {"scale"},
}
"""Fields every value of which has an implementation."""
_SOME: dict[type, dict[str, tuple]] = {
    spec.Rope: {"kind": tuple(ROPES)},
    spec.Attention: {"qk_norm": (None, "head", "all_heads"), "output_gate": (None, "per_element")},
    spec.Mamba2: {"activation": ("silu", "swish")},
    spec.GatedDelta: {"activation": ("silu", "swish")},
    spec.DenseMlp: {"activation": ACTIVATIONS},
    spec.Moe: {"activation": ACTIVATIONS},
    spec.Routing: {"score": SCORES},
}
"""Fields with the values that have one. A field in neither table must have its default: what a family may say one day
is refused until somebody has implemented it."""


def context(model: ModelSpec) -> int:
    """Tokens that prompt and answer may have together; 0: any number.

    LongRoPE turns all keys of a sequence otherwise, once it outgrows the original context, also those that are cached;
    some models of Mistral scale their queries by position from there on. Both are run up to there.
    """
    mixers = [mixer for layer, _ in model.layer_groups() for mixer in layer.mixers]
    ropes = [m.rope for m in mixers if isinstance(m, spec.Attention | spec.MlaAttention) and m.rope]
    limited = [rope.parameters for rope in ropes if rope.kind == "longrope" or SCALED_QUERIES in rope.parameters]
    originals = [fields.get("original_max_position_embeddings", 0) for fields in limited]
    return min(filter(None, (model.max_positions, *originals)), default=0)


def check_supported(model: ModelSpec) -> None:
    """UnsupportedModel unless every block has a layer here, its options an implementation and its weights a form that
    can be read. Needs no torch."""
    if model.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{model.architecture} can be planned but not run, since no family describes it: {'; '.join(model.notes)}"
        )
    if model.others:
        raise UnsupportedModel(f"{model.architecture}: blocks beside the layers are not supported")
    if factor := factors_of_inputs(model):
        raise UnsupportedModel(f"{model.architecture}: {factor} scales a layer's input, which the runtime does not do")
    _check_options(model, model.embedding, "embedding")
    _check_options(model, model.final_norm, "final norm")
    _check_options(model, model.head, "head")
    for layer, numbers in model.layer_groups():
        where = f"layer {numbers[0]}"
        _check_structure(model, layer, where)
        for block in layer.blocks:
            _check_options(model, block, where)
            _check_storage(model, block, where)
    _check_storage(model, model.head, "head")


def _check_structure(model: ModelSpec, layer: Layer, where: str) -> None:
    counts = len(layer.mixers), len(layer.feed_forward)
    stateful = sum(isinstance(mixer, STATEFUL) for mixer in layer.mixers)
    alone = counts[0] <= 1 or (counts[0] == 2 and stateful == 1)
    if not (alone and counts[1] <= 1 and any(counts)) or layer.others:
        raise UnsupportedModel(
            f"{model.architecture}, {where}: the runtime needs a mixer, or attention beside one with states, and a "
            f"feed-forward, or one of the two; here are {counts[0]} mixers, {counts[1]} feed-forwards and "
            f"{len(layer.others)} other blocks"
        )
    if layer.parallel_residual and (layer.mixer_post_norm or layer.feed_forward_norm):
        raise UnsupportedModel(f"{model.architecture}, {where}: parallel blocks have one norm, before them")
    blocks = [type(block) for block in (*layer.mixers, *layer.feed_forward)]
    if not set(blocks) <= {*MIXERS, *FEED_FORWARDS}:
        here = " and ".join(t.__name__ for t in blocks)
        known = ", ".join(t.__name__ for t in (*MIXERS, *FEED_FORWARDS))
        raise UnsupportedModel(f"{model.architecture}, {where}: {here}, the runtime has {known}")
    if any("latent_up.bias" in block.roles for block in layer.feed_forward):
        raise UnsupportedModel(
            f"{model.architecture}, {where}: a bias behind latent experts, which each rank would add"
        )


def _check_options(model: ModelSpec, block: spec.Block | spec.Routing | spec.Rope, where: str) -> None:
    every, some = _EVERY[type(block)], _SOME.get(type(block), {})
    for field in fields(block):
        value, legal = getattr(block, field.name), some.get(field.name, (field.default,))
        if field.name in every or field.name == "tensors":
            if isinstance(value, spec.Routing | spec.Rope | spec.DenseMlp):  # part of the block
                _check_options(model, value, where)
        elif value not in legal:
            option, words = f"{type(block).__name__}.{field.name}", ", ".join(map(str, legal))
            raise UnsupportedModel(f"{model.architecture}, {where}: {option} = {value!r}; the runtime supports {words}")
    if isinstance(block, spec.Rope):
        _check_scaling(model, block, where)


def _check_scaling(model: ModelSpec, rope: spec.Rope, where: str) -> None:
    if lacking := [name for name in ROPES[rope.kind] if name not in rope.parameters]:
        raise UnsupportedModel(
            f"{model.architecture}, {where}: rope scaling {rope.kind} without {' and '.join(lacking)}, which its "
            "config should have beside the type"
        )


def _check_storage(model: ModelSpec, block: spec.Block, where: str) -> None:
    if form := not_read(block):
        form = form.replace("{layer}", where.rpartition(" ")[2])
        raise UnsupportedModel(f"{model.architecture}, {where}: {form}")
