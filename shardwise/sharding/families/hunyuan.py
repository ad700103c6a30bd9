"""HunYuan, dense: Llama's layers, heads normed after their rotation, whose base a fixed factor stretches."""

from shardwise.sharding.blocks import attention, dense_mlp, heads_of, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Rope

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5))

    def layer(_: int) -> Layer:
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=config.flag("attention_bias"),
            rope=_rope(b, heads_of(b)[2]),
            qk_norm="head",
            qk_norm_after_rope=True,
            qk_norm_names=("query_layernorm", "key_layernorm"),
        )
        feed_forward = dense_mlp(b, f"{LAYER}.mlp", config.integer("intermediate_size"))
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER)

    return b.model(b.layers(layer, [0] * config.integer("num_hidden_layers")))


def _rope(b: Builder, dim: int) -> Rope:
    """A "dynamic" scaling with an `alpha` is static: NTK's larger base, theta * alpha^(d / (d - 2))."""
    rope = b.rope(dim)
    alpha = rope.parameters.get("alpha")
    if rope.kind != "dynamic" or not alpha:
        return rope
    return b.rope(dim, theta=rope.theta * alpha ** (dim / (dim - 2)), scaled=False)
