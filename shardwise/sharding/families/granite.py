"""Granite 3, dense: Llama's layers with multipliers for embedding, scores, residuals and logits."""

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-6))
    width, residual = config.integer("intermediate_size"), config.number("residual_multiplier", default=1.0)

    def layer(_: int) -> Layer:
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=config.flag("attention_bias"),
            scale=config.number("attention_multiplier", default=1.0, above=0.0),
        )
        feed_forward = dense_mlp(b, f"{LAYER}.mlp", width, bias=config.flag("mlp_bias"))
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER, residual_multiplier=residual)

    return b.model(
        b.layers(layer, [0] * config.integer("num_hidden_layers")),
        embedding_multiplier=config.number("embedding_multiplier", default=1.0),
        head_multiplier=1 / config.number("logits_scaling", default=1.0, above=0.0),
    )
