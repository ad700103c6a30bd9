"""Gemma 4: local and global heads of different sizes, values that are the keys, dense MLP and experts side by side."""

from dataclasses import replace

from shardwise.sharding.axes import fixed
from shardwise.sharding.blocks import attention, dense_mlp, head_axes, stacked_moe
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Attention, Block, Rope, Routing

PREFIX = "model.language_model."
LAYER = f"{PREFIX}layers.{{layer}}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    _refuse_small(text)
    b = Builder(text, name, architecture, prefix=PREFIX, norm_eps=text.number("rms_norm_eps", default=1e-6))
    count = text.integer("num_hidden_layers")
    types = text.list("layer_types", length=count, of=str)

    def layer(key: tuple[str, int, int]) -> Layer:
        feed_forward: tuple[Block, ...] = (dense_mlp(b, f"{LAYER}.mlp", text.integer("intermediate_size")),)
        others: tuple[Block, ...] = (_scalar(b),)
        if text.flag("enable_moe_block"):
            feed_forward += (_experts(b, text),)
            others += tuple(
                b.norm(f"feed_forward_{role}", f"{LAYER}.{where}_feedforward_layernorm_{i}")
                for role, where, i in (
                    ("mlp_post_norm", "post", 1),
                    ("moe_norm", "pre", 2),
                    ("moe_post_norm", "post", 2),
                )
            )
        return Layer(
            mixers=(_mixer(b, text, *key),),
            feed_forward=feed_forward,
            mixer_norm=b.norm("mixer_norm", f"{LAYER}.input_layernorm"),
            mixer_post_norm=b.norm("mixer_post_norm", f"{LAYER}.post_attention_layernorm"),
            feed_forward_norm=b.norm("feed_forward_norm", f"{LAYER}.pre_feedforward_layernorm"),
            feed_forward_post_norm=b.norm("feed_forward_post_norm", f"{LAYER}.post_feedforward_layernorm"),
            others=others,
        )

    return b.model(
        b.layers(layer, [(kind, *_heads(text, kind, i)) for i, kind in enumerate(types)]),
        tied_default=True,
        embedding_multiplier=b.hidden_size**0.5,
        softcap=text.number("final_logit_softcapping", default=None),
    )


def _refuse_small(c: Config) -> None:
    """ConfigError for what E2B and E4B have: an embedding for every layer, and layers that use the keys of others."""
    for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if value := c.integer(name, default=0, least=0):
            raise c.error(
                (name,), value, "0: inputs of each layer and shared keys (Gemma 4 E2B, E4B) are not supported"
            )


def _heads(c: Config, kind: str, layer: int) -> tuple[int, int]:
    """Head size and KV heads of a layer: `global_*` fields, or overrides by layer number."""
    own = c.own("per_layer_config").own(str(layer))
    head_dim, kv = c.integer("head_dim"), c.integer("num_key_value_heads", default=c.integer("num_attention_heads"))
    if kind == "full_attention":
        head_dim = c.integer("global_head_dim", default=head_dim)
        kv = c.integer("num_global_key_value_heads", default=kv)
    return own.integer("head_dim", default=head_dim), own.integer("num_key_value_heads", default=kv)


def _mixer(b: Builder, c: Config, kind: str, head_dim: int, kv: int) -> Attention:
    full = kind == "full_attention"
    ropes = c.own("rope_parameters").own(kind)
    rope = Rope(
        theta=ropes.number("rope_theta", default=1e6 if full else 1e4),
        dim=int(head_dim * ropes.fraction("partial_rotary_factor", default=1.0)),
        kind=ropes.text("rope_type", default="default"),
    )
    return attention(
        b,
        f"{LAYER}.self_attn",
        heads=(*head_axes(b, c.integer("num_attention_heads"), kv), head_dim),
        qkv_bias=c.flag("attention_bias"),
        scale=1.0,
        rope=rope,
        window=None if full else c.integer("sliding_window"),
        qk_norm="head",
        v_norm=True,
        k_is_v=full and c.flag("attention_k_eq_v"),
    )


def _experts(b: Builder, c: Config):
    experts = c.integer("num_experts")
    block = stacked_moe(
        b,
        LAYER,
        experts,
        c.integer("moe_intermediate_size"),
        Routing(top_k=c.integer("top_k_experts", "num_experts_per_tok", most=experts)),
        router="router.proj",
    )
    scales = (
        b.vector("router.input_scale", f"{LAYER}.router.scale", b.hidden),
        b.vector("router.expert_scale", f"{LAYER}.router.per_expert_scale", fixed(experts)),
    )
    return replace(block, tensors=block.tensors + scales)


def _scalar(b: Builder) -> Block:
    """The factor on the layer's output."""
    return Block((replace(b.vector("layer_scalar", f"{LAYER}.layer_scalar", fixed(1)), values=0, optional=True),))
