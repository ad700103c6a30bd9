"""Blocks that many families share, in Hugging Face names. Families override names and switches, nothing else."""

from typing import Any

from shardwise.sharding.axes import Axis, Dim, LogicalAxis, along, concat, fixed
from shardwise.sharding.builder import Builder, Tensors
from shardwise.sharding.model import Layer
from shardwise.sharding.spec import Attention, DenseMlp, Moe, Rope, Routing

_DEFAULT: Any = object()


def heads_of(b: Builder) -> tuple[LogicalAxis, LogicalAxis, int]:
    """Query axis, KV axis and head size from the usual fields; null KV heads mean as many as query heads."""
    c = b.config
    heads = c.integer("num_attention_heads", "n_head")
    kv = c.integer("num_key_value_heads", default=heads)
    head_dim = c.integer("head_dim", default=b.head_dim, least=0)
    if not head_dim and b.hidden_size % heads:
        raise c.error(("hidden_size",), b.hidden_size, f"a multiple of num_attention_heads {heads}, or a head_dim")
    return *head_axes(b, heads, kv), head_dim or b.hidden_size // heads


def head_axes(b: Builder, heads: int, kv: int) -> tuple[LogicalAxis, LogicalAxis]:
    if heads % kv:
        raise b.config.error(("num_key_value_heads",), kv, f"a divisor of num_attention_heads {heads}")
    return LogicalAxis(Axis.Q_HEADS, heads, kv), LogicalAxis(Axis.KV_HEADS, kv, kv)


def attention(
    b: Builder,
    module: str,
    *,
    heads: tuple[LogicalAxis, LogicalAxis, int] | None = None,
    v_head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool | None = None,
    fused: str | None = None,
    rope: Rope | None = _DEFAULT,
    scale: float | None = None,
    qk_norm: str | None = None,
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm"),
    names: dict[str, str] | None = None,
    extra: Tensors = (),
    **options: Any,
) -> Attention:
    """Softmax attention below `module`. `fused`: name of a projection that holds q, k and v concatenated.

    Options are fields of `Attention`; `output_gate="per_element"` doubles the query projection inside each head.
    """
    q_axis, kv_axis, d = heads or heads_of(b)
    dv = v_head_dim or d
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"} | (names or {})
    q = along(q_axis, 2 * d if options.get("output_gate") == "per_element" else d)
    k, v = along(kv_axis, d), along(kv_axis, dv)
    tensors: Tensors = ()
    if fused:
        tensors += b.linear("qkv", f"{module}.{fused}", concat(q, k, v), b.hidden, bias_too=qkv_bias)
    else:
        parts = [("q", q), ("k", k)] + ([] if options.get("k_is_v") else [("v", v)])
        for role, out in parts:
            tensors += b.linear(role, f"{module}.{names[role]}", out, b.hidden, bias_too=qkv_bias)
    o_bias = qkv_bias if o_bias is None else o_bias
    tensors += b.linear("o", f"{module}.{names['o']}", b.hidden, along(q_axis, dv), bias_too=o_bias)
    if qk_norm and options.get("qk_norm_weighted", True):
        tensors += _qk_norms(b, module, qk_norm, qk_norm_names, q_axis, kv_axis, d)
    if options.get("sinks"):
        tensors += (b.vector("sinks", f"{module}.{names.get('sinks', 'sinks')}", along(q_axis)),)
    return Attention(
        tensors + extra,
        q_axis=q_axis,
        kv_axis=kv_axis,
        head_dim=d,
        v_head_dim=dv,
        scale=d**-0.5 if scale is None else scale,
        rope=b.rope(d) if rope is _DEFAULT else rope,
        qk_norm=qk_norm,
        norm_eps=b.norm_eps,
        norm_weight_offset=b.norm_weight_offset,
        **options,
    )


def _qk_norms(b: Builder, module: str, kind: str, names, q_axis: LogicalAxis, kv_axis: LogicalAxis, d: int) -> Tensors:
    dims: tuple[Dim, Dim] = (along(q_axis, d), along(kv_axis, d)) if kind == "all_heads" else (fixed(d), fixed(d))
    return tuple(
        b.vector(f"{role}.weight", f"{module}.{name}.weight", dim)
        for role, name, dim in zip(("q_norm", "k_norm"), names, dims, strict=True)
    )


def dense_mlp(
    b: Builder,
    module: str,
    width: int,
    *,
    activation: str | None = None,
    bias: bool = False,
    fused: str | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    role: str = "",
    gated: bool = True,
    **options: Any,
) -> DenseMlp:
    """A feed-forward of `width`. `fused`: name of a projection that holds gate and up concatenated."""
    axis = LogicalAxis(Axis.MLP, width)
    mlp, (gate, up, down) = along(axis), names
    if fused:
        tensors = b.linear(f"{role}gate_up", f"{module}.{fused}", concat(mlp, mlp), b.hidden, bias_too=bias)
    else:
        tensors = b.linear(f"{role}gate", f"{module}.{gate}", mlp, b.hidden, bias_too=bias) if gated else ()
        tensors += b.linear(f"{role}up", f"{module}.{up}", mlp, b.hidden, bias_too=bias)
    tensors += b.linear(f"{role}down", f"{module}.{down}", b.hidden, mlp, bias_too=bias)
    return DenseMlp(tensors, mlp_axis=axis, activation=activation or activation_of(b), gated=gated, **options)


def activation_of(b: Builder) -> str:
    return b.config.text("hidden_act", "hidden_activation", "activation_function", default="silu")


def moe(
    b: Builder,
    module: str,
    experts: int,
    width: int,
    routing: Routing,
    *,
    activation: str | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    experts_name: str = "experts",
    router: str = "gate",
    correction: str | None = None,
    correction_dtype: str = "F32",
    router_bias: bool = False,
    inner: Dim | None = None,
    gated: bool = True,
    extra: Tensors = (),
    **options: Any,
) -> Moe:
    """Experts with tensors of their own (`{expert}` in the names), and a router that every rank holds."""
    expert_axis, axis = LogicalAxis(Axis.EXPERTS, experts), LogicalAxis(Axis.EXPERT_MLP, width)
    mlp, hidden, every = along(axis), inner or b.hidden, fixed(experts)
    base = f"{module}.{experts_name}.{{expert}}"
    tensors = b.linear("router", f"{module}.{router}", every, b.hidden, plain=True, bias_too=router_bias)
    if correction:
        tensors += (b.vector("router.correction", f"{module}.{correction}", every, dtype=correction_dtype),)
    if gated:
        tensors += b.linear("gate", f"{base}.{names[0]}", mlp, hidden, experts=expert_axis)
    tensors += b.linear("up", f"{base}.{names[1]}", mlp, hidden, experts=expert_axis)
    tensors += b.linear("down", f"{base}.{names[2]}", hidden, mlp, experts=expert_axis)
    return Moe(
        tensors + extra,
        expert_axis=expert_axis,
        mlp_axis=axis,
        routing=routing,
        activation=activation or activation_of(b),
        gated=gated,
        **options,
    )


def pre_norm_layer(
    b: Builder, mixer, feed_forward, *, prefix: str, norms=("input_layernorm", "post_attention_layernorm"), **options
):
    """The common decoder layer: norm, mixer, residual, norm, feed-forward, residual."""
    return Layer(
        mixers=(mixer,),
        feed_forward=(feed_forward,),
        mixer_norm=b.norm("mixer_norm", f"{prefix}.{norms[0]}"),
        feed_forward_norm=b.norm("feed_forward_norm", f"{prefix}.{norms[1]}"),
        **options,
    )


def stacked_moe(
    b: Builder,
    module: str,
    experts: int,
    width: int,
    routing: Routing,
    *,
    activation: str | None = None,
    names: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj"),
    suffix: str = "",
    router: str = "gate",
    router_bias: bool = False,
    correction: str | None = None,
    bias: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
    extra: Tensors = (),
    **options: Any,
) -> Moe:
    """Experts stacked in 3-D tensors [E, out, in] ([E, in, out] if `transposed`), gate and up in one.

    `interleaved`: rows are gate 0, up 0, gate 1, up 1, ...; else all gates come before all ups.
    """
    expert_axis, axis = LogicalAxis(Axis.EXPERTS, experts), LogicalAxis(Axis.EXPERT_MLP, width)
    mlp, lead = along(axis), (along(expert_axis),)
    gate_up = along(axis, 2) if interleaved else concat(mlp, mlp)
    shared: dict[str, Any] = {"lead": lead, "suffix": suffix, "transposed": transposed, "bias_too": bias}
    tensors = b.linear("router", f"{module}.{router}", fixed(experts), b.hidden, plain=True, bias_too=router_bias)
    if correction:
        tensors += (b.vector("router.correction", f"{module}.{correction}", fixed(experts), dtype="F32"),)
    tensors += b.linear("gate_up", f"{module}.{names[0]}", gate_up, b.hidden, **shared)
    tensors += b.linear("down", f"{module}.{names[1]}", b.hidden, mlp, **shared)
    return Moe(
        tensors + extra,
        expert_axis=expert_axis,
        mlp_axis=axis,
        routing=routing,
        activation=activation or activation_of(b),
        stacked=True,
        transposed=transposed,
        gate_up_interleaved=interleaved,
        **options,
    )
