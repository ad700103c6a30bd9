"""GLM-4, dense (0414): half of each head rotated in pairs of neighbours, norms after the blocks, gate and up in one."""

from dataclasses import replace
from typing import Any

from shardwise.sharding.blocks import attention, dense_mlp, heads_of
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"
PARTIAL = 0.5
NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_self_attn_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward_post_norm": "post_mlp_layernorm",
}


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    eps = config.number("rms_norm_eps", default=1.5625e-7)
    b = Builder(config, name, architecture, norm_eps=eps, rope_partial=PARTIAL)
    rope = replace(b.rope(heads_of(b)[2]), interleaved=True)

    def layer(_: int) -> Layer:
        biased = config.flag("attention_bias", default=True)
        mixer = attention(b, f"{LAYER}.self_attn", qkv_bias=biased, o_bias=False, rope=rope)
        feed_forward = dense_mlp(b, f"{LAYER}.mlp", config.integer("intermediate_size"), fused="gate_up_proj")
        norms: dict[str, Any] = {where: b.norm(where, f"{LAYER}.{norm}") for where, norm in NORMS.items()}
        return Layer(mixers=(mixer,), feed_forward=(feed_forward,), **norms)

    return b.model(b.layers(layer, [0] * config.integer("num_hidden_layers")))
