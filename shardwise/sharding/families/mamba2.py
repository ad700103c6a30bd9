"""Mamba-2 alone: a state-space mixer in every layer and nothing else."""

from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.recurrent import mamba2

LAYER = "backbone.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("layer_norm_epsilon", default=1e-5))

    def layer(_: int) -> Layer:
        mixer = mamba2(
            b,
            f"{LAYER}.mixer",
            heads=config.integer("num_heads"),
            head_dim=config.integer("head_dim", default=64),
            groups=config.integer("n_groups", default=8),
            state=config.integer("state_size", default=128),
            kernel=config.integer("conv_kernel", default=4),
            conv_bias=config.flag("use_conv_bias", default=True),
            proj_bias=config.flag("use_bias"),
            chunk=config.integer("chunk_size", default=256),
            activation=config.text("hidden_act", default="silu"),
            dt_limits=tuple(config.list("time_step_limit", default=[0.0, float("inf")], of=(int, float), length=2)),
        )
        return Layer(mixers=(mixer,), mixer_norm=b.norm("mixer_norm", f"{LAYER}.norm"))

    layers = b.layers(layer, [0] * config.integer("num_hidden_layers"))
    return b.model(layers, embed_name="backbone.embeddings", final_norm_name="backbone.norm_f")
