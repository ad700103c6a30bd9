"""Gemma 1, 2 and 3: scaled tied embedding, norms with weight offset 1, norms after the blocks from Gemma 2 on."""

from typing import Any

from shardwise.sharding.blocks import attention, dense_mlp
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Rope

THIRD_THETA, LOCAL_THETA = 1e6, 10000.0
GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
"""What published configs of Gemma 3 that also sees leave out of their `text_config`."""


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    if text.data:
        said = {name: value for name, value in text.data.items() if value is not None}
        text = Config(GEMMA3_DEFAULTS | said, text.source, config)
    if text.flag("use_bidirectional_attention"):
        raise text.error(("use_bidirectional_attention",), True, "false: an encoder generates no text")
    nested = "language_model." if architecture == "Gemma3ForConditionalGeneration" else ""
    b = Builder(text, name, architecture, prefix=f"{nested}model.", norm_weight_offset=1.0, head_dim=256)
    b.norm_eps = text.number("rms_norm_eps", default=1e-6)
    module, count = f"{b.prefix}layers.{{layer}}", text.integer("num_hidden_layers")
    first, third = architecture == "GemmaForCausalLM", architecture.startswith("Gemma3")
    head_dim = text.integer("head_dim", default=b.head_dim)
    scored = float(head_dim) if first else 256.0
    b.rope_theta = THIRD_THETA if third else b.rope_theta

    def layer(window: int | None) -> Layer:
        mixer = attention(
            b,
            f"{module}.self_attn",
            qkv_bias=text.flag("attention_bias"),
            scale=text.number("query_pre_attn_scalar", default=scored, above=0.0) ** -0.5,
            softcap=None if third else text.number("attn_logit_softcapping", default=None),
            window=window,
            rope=_rope(b, head_dim, local=third and window is not None),
            qk_norm="head" if third else None,
        )
        width = text.integer("intermediate_size")
        feed_forward = dense_mlp(b, f"{module}.mlp", width, activation=_activation(text, first))
        norms = {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
        if not first:
            norms["mixer_post_norm"] = "post_attention_layernorm"
            norms["feed_forward_norm"] = "pre_feedforward_layernorm"
            norms["feed_forward_post_norm"] = "post_feedforward_layernorm"
        built: dict[str, Any] = {where: b.norm(where, f"{module}.{norm}") for where, norm in norms.items()}
        return Layer(mixers=(mixer,), feed_forward=(feed_forward,), **built)

    return b.model(
        b.layers(layer, _windows(text, architecture, count)),
        tied_default=True,
        head_name=f"{nested}lm_head",
        embedding_multiplier=b.hidden_size**0.5,
        softcap=text.number("final_logit_softcapping", default=None),
    )


def _activation(c: Config, first: bool) -> str:
    """The first Gemma published `gelu` and meant its tanh approximation."""
    named = c.text("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    return "gelu_pytorch_tanh" if first and named == "gelu" else named


def _rope(b: Builder, head_dim: int, local: bool) -> Rope:
    """Windowed layers of Gemma 3 have a rotation of their own, stretched only where their own parameters say so."""
    if not local:
        return b.rope(head_dim)
    return b.rope(
        head_dim,
        theta=b.config.number("rope_local_base_freq", default=None),
        scaled=b.config.own("rope_parameters").has("sliding_attention"),
        kind="sliding_attention",
        default_theta=LOCAL_THETA,
    )


def _windows(c: Config, architecture: str, count: int) -> list[int | None]:
    """Gemma 2 alternates window and full, Gemma 3 has one full layer after `sliding_window_pattern` - 1 windows."""
    if architecture == "GemmaForCausalLM":
        return [None] * count
    window = c.integer("sliding_window", default=4096)
    types = c.list("layer_types", default=None, length=count, of=str)
    if types:
        return [window if t == "sliding_attention" else None for t in types]
    pattern = 2 if architecture == "Gemma2ForCausalLM" else c.integer("sliding_window_pattern", default=6)
    return [None if (i + 1) % pattern == 0 else window for i in range(count)]
