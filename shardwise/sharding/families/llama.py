"""Llama 2/3, Mistral, Qwen2, Qwen3, MiMo, MiniCPM and their kin: pre-norm, GQA, gated MLP."""

from typing import Any

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.mtp import mtp_layers

QKV_BIAS = ("Qwen2ForCausalLM", "MiMoForCausalLM")
"""Whose attention has biases for queries, keys and values whatever their config says."""
HEAD_NORM = ("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration")


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    prefix, head = "model.", "lm_head"
    if architecture == "Qwen3VLForConditionalGeneration":
        prefix = "model.language_model."
    elif architecture == "Mistral3ForConditionalGeneration":
        prefix, head = "language_model.model.", "language_model.lm_head"
    b = Builder(text, name, architecture, prefix=prefix, norm_eps=text.number("rms_norm_eps", default=1e-6))
    b.head_dim = 128 if architecture in HEAD_NORM else 0
    count, width = text.integer("num_hidden_layers"), text.integer("intermediate_size")
    module = f"{prefix}layers.{{layer}}"
    qkv_bias = text.flag("attention_bias") or architecture in QKV_BIAS
    extra_depth = _minicpm(text) if architecture == "MiniCPMForCausalLM" else {}

    def layer(window: int | None) -> Layer:
        mixer = attention(
            b,
            f"{module}.self_attn",
            qkv_bias=qkv_bias,
            o_bias=qkv_bias and architecture not in QKV_BIAS,
            qk_norm="head" if architecture in HEAD_NORM else None,
            window=window,
        )
        feed_forward = dense_mlp(b, f"{module}.mlp", width, bias=text.flag("mlp_bias"))
        return pre_norm_layer(b, mixer, feed_forward, prefix=module, **extra_depth.get("layer", {}))

    layers = b.layers(layer, windows(text, architecture, count))
    if architecture == "MiMoForCausalLM":
        mtp_layers(
            b,
            text,
            layers[-1],
            module,
            base="model.mtp_layers.{layer}",
            names=("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        )
    return b.model(layers, head_name=head, **extra_depth.get("model", {}))


MAX_WINDOW_LAYERS = 28
"""Of Qwen's configs that do not say."""


def windows(config: Config, architecture: str, count: int) -> list[int | None]:
    """Sliding window of every layer. Mistral: all layers. Qwen, if switched on: those that `layer_types` names, else
    the layers from `max_window_layers` on, in Qwen2-MoE every other one before it; in Qwen3-MoE all."""
    window = config.integer("sliding_window", default=0, least=0)
    if architecture in ("LlamaForCausalLM", "MiniCPMForCausalLM") or not window:
        return [None] * count
    if architecture.startswith("Mistral"):
        return [window] * count
    if not config.flag("use_sliding_window"):
        return [None] * count
    last = config.integer("max_window_layers", default=MAX_WINDOW_LAYERS, least=0)
    kinds = config.list("layer_types", default=None, length=count, of=str)
    if architecture == "Qwen3MoeForCausalLM":
        windowed = [True] * count
    elif kinds:
        windowed = [kind == "sliding_attention" for kind in kinds]
    elif architecture == "Qwen2MoeForCausalLM":
        windowed = [i < last and i % 2 == 0 for i in range(count)]
    else:
        windowed = [i >= last for i in range(count)]
    return [window if inside else None for inside in windowed]


def _minicpm(c: Config) -> dict[str, dict[str, Any]]:
    """Scaled embedding, residuals scaled by depth, head input scaled by width."""
    depth = c.number("scale_depth", default=1.0) / c.integer("num_hidden_layers") ** 0.5
    width = c.integer("hidden_size") / c.integer("dim_model_base", default=c.integer("hidden_size"))
    return {
        "layer": {"residual_multiplier": depth},
        "model": {"embedding_multiplier": c.number("scale_emb", default=1.0), "head_multiplier": 1 / width},
    }
