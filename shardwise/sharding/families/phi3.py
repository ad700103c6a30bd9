"""Phi-3, Phi-3.5, Phi-4: fused qkv and fused gate-up projections."""

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5))
    window = config.integer("sliding_window", default=None)
    width = config.integer("intermediate_size")

    def layer(_: None) -> Layer:
        mixer = attention(b, f"{LAYER}.self_attn", fused="qkv_proj", o_bias=False, window=window)
        return pre_norm_layer(b, mixer, dense_mlp(b, f"{LAYER}.mlp", width, fused="gate_up_proj"), prefix=LAYER)

    return b.model(b.layers(layer, [None] * config.integer("num_hidden_layers")))
