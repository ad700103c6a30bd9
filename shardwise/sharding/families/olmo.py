"""OLMo 2, OLMo 3 (norms after the blocks, QK-norm over all heads) and OLMoE (pre-norm, experts)."""

from shardwise.sharding.blocks import attention, dense_mlp, moe, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Routing

LAYER = "model.layers.{layer}"
THIRD_THETA = 5e5
FULL_EVERY = 4
"""Of OLMo 3's layers, where `layer_types` does not say: one has no window."""


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5))
    count = config.integer("num_hidden_layers")
    window = config.integer("sliding_window", default=4096)
    third = architecture == "Olmo3ForCausalLM"
    b.rope_theta = THIRD_THETA if third else b.rope_theta
    default = ["sliding_attention" if third and (i + 1) % FULL_EVERY else "full_attention" for i in range(count)]
    types = config.list("layer_types", default=default, length=count, of=str)
    windows = [window if t == "sliding_attention" else None for t in types]

    def layer(window: int | None) -> Layer:
        # OLMo 3 stretches the rotation of its full-attention layers; the others may have parameters of their own.
        own = config.own("rope_parameters").has("sliding_attention")
        rope = b.rope(
            b.config.integer("head_dim", default=b.hidden_size // config.integer("num_attention_heads")),
            scaled=window is None or own,
            kind="full_attention" if window is None else "sliding_attention",
        )
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=config.flag("attention_bias"),
            qk_norm="all_heads",
            window=window,
            rope=rope,
            qk_clip=config.number("clip_qkv", default=None),
        )
        if architecture == "OlmoeForCausalLM":
            return pre_norm_layer(b, mixer, _experts(b, config), prefix=LAYER)
        return Layer(
            mixers=(mixer,),
            feed_forward=(dense_mlp(b, f"{LAYER}.mlp", config.integer("intermediate_size")),),
            mixer_post_norm=b.norm("mixer_post_norm", f"{LAYER}.post_attention_layernorm"),
            feed_forward_post_norm=b.norm("feed_forward_post_norm", f"{LAYER}.post_feedforward_layernorm"),
        )

    return b.model(b.layers(layer, windows))


def _experts(b: Builder, c: Config):
    experts = c.integer("num_experts")
    routing = Routing(top_k=c.integer("num_experts_per_tok", most=experts), normalize=c.flag("norm_topk_prob"))
    return moe(b, f"{LAYER}.mlp", experts, c.integer("intermediate_size"), routing)
