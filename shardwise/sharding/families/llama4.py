"""Llama 4: chunked attention, layers without rotation, stacked transposed experts beside a shared one."""

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer, stacked_moe
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Routing

PREFIX = "language_model.model."
LAYER = f"{PREFIX}layers.{{layer}}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    b = Builder(text, name, architecture, prefix=PREFIX, norm_eps=text.number("rms_norm_eps", default=1e-5))
    count = text.integer("num_hidden_layers")
    step = text.integer("interleave_moe_layer_step", default=1)
    no_rope = text.integer("no_rope_layer_interval", default=4)
    chunk = text.integer("attention_chunk_size", default=8192)
    rope_flags = text.list("no_rope_layers", default=[], of=int) or [int((i + 1) % no_rope != 0) for i in range(count)]

    def layer(key: tuple[bool, bool]) -> Layer:
        rotated, sparse = key
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=text.flag("attention_bias"),
            chunk=chunk if rotated else None,
            # The norm of rotated queries and keys has no weight.
            qk_norm="head" if rotated and text.flag("use_qk_norm", default=True) else None,
            qk_norm_weighted=False,
            qk_norm_after_rope=True,
            temperature=None
            if rotated
            else (text.number("floor_scale", default=8192.0), text.number("attn_scale", default=0.1)),
            rope=b.rope(text.integer("head_dim")) if rotated else None,
        )
        return pre_norm_layer(b, mixer, _experts(b, text) if sparse else _dense(b, text), prefix=LAYER)

    keys = [(bool(rope_flags[i]), (i + 1) % step == 0) for i in range(count)]
    return b.model(b.layers(layer, keys), head_name="language_model.lm_head")


def _dense(b: Builder, c: Config):
    return dense_mlp(b, f"{LAYER}.feed_forward", c.integer("intermediate_size_mlp"))


def _experts(b: Builder, c: Config):
    experts, width = c.integer("num_local_experts"), c.integer("intermediate_size")
    routing = Routing(
        top_k=c.integer("num_experts_per_tok", most=experts), score="sigmoid", normalize=False, scores_scale_input=True
    )
    module = f"{LAYER}.feed_forward"
    shared = dense_mlp(b, f"{module}.shared_expert", width, role="shared.")
    return stacked_moe(b, module, experts, width, routing, router="router", transposed=True, shared=shared)
