"""MiMo-V2: values narrower than keys, twice the KV heads and sinks in sliding layers, experts without a shared one."""

from shardwise.sharding.blocks import attention, dense_mlp, head_axes, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.latent import deepseek_moe, sparse_layers
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Attention

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("layernorm_epsilon", "rms_norm_eps", default=1e-5))
    count = config.integer("num_hidden_layers")
    sliding = config.list("hybrid_layer_pattern", length=count, of=int)

    def layer(key: tuple[bool, bool]) -> Layer:
        local, sparse = key
        feed_forward = (
            deepseek_moe(b, f"{LAYER}.mlp", correction=True)
            if sparse
            else dense_mlp(b, f"{LAYER}.mlp", config.integer("intermediate_size"))
        )
        return pre_norm_layer(b, _mixer(b, config, local), feed_forward, prefix=LAYER)

    return b.model(b.layers(layer, list(zip(map(bool, sliding), sparse_layers(b, count), strict=True))))


def _mixer(b: Builder, c: Config, local: bool) -> Attention:
    swa = "swa_" if local else ""
    heads = c.integer(f"{swa}num_attention_heads", "num_attention_heads")
    kv = c.integer(f"{swa}num_key_value_heads", "num_key_value_heads")
    head_dim = c.integer(f"{swa}head_dim", "head_dim")
    sinks = c.flag("add_swa_attention_sink_bias" if local else "add_full_attention_sink_bias", default=local)
    return attention(
        b,
        f"{LAYER}.self_attn",
        heads=(*head_axes(b, heads, kv), head_dim),
        v_head_dim=c.integer(f"{swa}v_head_dim", "v_head_dim"),
        qkv_bias=c.flag("attention_bias"),
        o_bias=False,
        rope=b.rope(
            head_dim,
            theta=c.number("swa_rope_theta", default=None) if local else None,
            kind="sliding_attention" if local else "full_attention",
        ),
        window=c.integer("sliding_window", "sliding_window_size") if local else None,
        sinks=sinks,
        names={"sinks": "attention_sink_bias"},
        value_scale=c.number("attention_value_scale", default=1.0),
    )
