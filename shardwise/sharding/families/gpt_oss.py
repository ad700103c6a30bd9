"""gpt-oss: biases everywhere, attention sinks, alternating windows, interleaved gate and up rows, MXFP4 experts."""

from shardwise.sharding.blocks import attention, pre_norm_layer, stacked_moe
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Routing

LAYER = "model.layers.{layer}"
SWIGLU_ALPHA = 1.702
THETA = 150000.0


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    eps = config.number("rms_norm_eps", default=1e-5)
    b = Builder(config, name, architecture, norm_eps=eps, head_dim=64, rope_theta=THETA)
    experts, count = config.integer("num_local_experts", "num_experts"), config.integer("num_hidden_layers")
    top_k = config.integer("num_experts_per_tok", "experts_per_token", most=experts)
    window = config.integer("sliding_window", default=128)
    types = config.list("layer_types", length=count, of=str, default=["sliding_attention", "full_attention"] * count)

    def layer(kind: str) -> Layer:
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=config.flag("attention_bias", default=True),
            sinks=True,
            window=window if kind == "sliding_attention" else None,
        )
        feed_forward = stacked_moe(
            b,
            f"{LAYER}.mlp",
            experts,
            config.integer("intermediate_size"),
            Routing(top_k=top_k, softmax_after_topk=True),
            router="router",
            router_bias=True,
            bias=True,
            interleaved=True,
            transposed=True,
            limit=config.number("swiglu_limit", default=7.0),
            alpha=config.number("swiglu_alpha", default=SWIGLU_ALPHA),
        )
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER)

    return b.model(b.layers(layer, types[:count]))
