"""ERNIE 4.5, dense: Llama's layers, rotated in pairs of neighbours."""

from dataclasses import replace

from shardwise.sharding.blocks import attention, dense_mlp, heads_of, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"
THETA = 5e5


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5), rope_theta=THETA)
    rope = replace(b.rope(heads_of(b)[2]), interleaved=True)
    biased, width = config.flag("use_bias"), config.integer("intermediate_size")

    def layer(_: int) -> Layer:
        mixer = attention(b, f"{LAYER}.self_attn", qkv_bias=biased, rope=rope)
        return pre_norm_layer(b, mixer, dense_mlp(b, f"{LAYER}.mlp", width, bias=biased), prefix=LAYER)

    return b.model(b.layers(layer, [0] * config.integer("num_hidden_layers")), tied_default=True)
