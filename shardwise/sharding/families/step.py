"""Step 3.5/3.7 Flash: gate on each head's output, stacked experts with separate gate and up, one shared expert."""

from shardwise.sharding.axes import Axis, LogicalAxis, along, fixed
from shardwise.sharding.blocks import activation_of, attention, dense_mlp, head_axes, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.latent import sparse_layers
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Moe, Routing

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    b = Builder(text, name, architecture, norm_weight_offset=1.0)
    b.norm_eps = text.number("rms_norm_eps", default=1e-5)
    count = text.integer("num_hidden_layers")
    types = text.list("layer_types", default=["full_attention"] * count, of=str)[:count]
    if len(types) < count:
        raise text.error(("layer_types",), types, f"at least {count} items, one a layer")

    def layer(key: tuple[str, bool]) -> Layer:
        kind, sparse = key
        local = kind == "sliding_attention"
        heads = text.integer("num_attention_heads")
        heads = text.integer("num_sliding_attention_heads", default=heads) if local else heads
        q_axis, kv_axis = head_axes(b, heads, text.integer("num_key_value_heads", "num_attention_groups"))
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            heads=(q_axis, kv_axis, text.integer("head_dim")),
            qkv_bias=text.flag("attention_bias"),
            window=text.integer("sliding_window") if local else None,
            qk_norm="head",
            output_gate="per_head",
            extra=b.linear("gate", f"{LAYER}.self_attn.g_proj", along(q_axis), b.hidden),
        )
        dense = dense_mlp(b, f"{LAYER}.mlp", text.integer("intermediate_size"))
        return pre_norm_layer(b, mixer, _experts(b, text) if sparse else dense, prefix=LAYER)

    return b.model(b.layers(layer, list(zip(types, sparse_layers(b, count), strict=True))))


def _experts(b: Builder, c: Config) -> Moe:
    experts = c.integer("num_experts", "n_routed_experts", "moe_num_experts")
    expert_axis = LogicalAxis(Axis.EXPERTS, experts)
    axis = LogicalAxis(Axis.EXPERT_MLP, c.integer("moe_intermediate_size"))
    mlp, lead, module = along(axis), (along(expert_axis),), f"{LAYER}.moe"
    tensors = b.linear("router", f"{module}.gate", fixed(experts), b.hidden, plain=True)
    tensors += (b.vector("router.correction", f"{module}.router_bias", fixed(experts), dtype="F32"),)
    tensors += b.linear("gate", f"{module}.gate_proj", mlp, b.hidden, lead=lead)
    tensors += b.linear("up", f"{module}.up_proj", mlp, b.hidden, lead=lead)
    tensors += b.linear("down", f"{module}.down_proj", b.hidden, mlp, lead=lead)
    routing = Routing(
        top_k=c.integer("num_experts_per_tok", "moe_top_k", most=experts),
        score=c.text("scoring_func", default="sigmoid"),
        bias_correction=True,
        scale=c.number("moe_router_scaling_factor", default=1.0),
    )
    return Moe(
        tensors,
        expert_axis=expert_axis,
        mlp_axis=axis,
        routing=routing,
        activation=activation_of(b),
        stacked=True,
        shared=dense_mlp(b, f"{LAYER}.share_expert", c.integer("share_expert_dim"), role="shared."),
    )
