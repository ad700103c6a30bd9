"""Mixtral: eight experts a layer, softmax over the chosen ones."""

from shardwise.sharding.blocks import attention, moe, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Routing

LAYER = "model.layers.{layer}"
W1_W3_W2 = ("w1", "w3", "w2")


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5), rope_theta=1e6)
    experts, width = config.integer("num_local_experts"), config.integer("intermediate_size")
    routing = Routing(top_k=config.integer("num_experts_per_tok", most=experts))
    window = config.integer("sliding_window", default=None)

    def layer(_: None) -> Layer:
        mixer = attention(b, f"{LAYER}.self_attn", window=window)
        feed_forward = moe(b, f"{LAYER}.block_sparse_moe", experts, width, routing, names=W1_W3_W2)
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER)

    return b.model(b.layers(layer, [None] * config.integer("num_hidden_layers")))
