"""Llama 2/3, Mistral, Qwen2, Qwen3 and their kin: pre-norm, GQA, gated MLP."""

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.spec import Layer, ModelSpec

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-6))
    count = config.integer("num_hidden_layers")
    width = config.integer("intermediate_size")
    qkv_bias = config.flag("attention_bias", default=architecture == "Qwen2ForCausalLM")
    windows = _windows(config, architecture, count)

    def layer(window: int | None) -> Layer:
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=qkv_bias,
            o_bias=False if architecture == "Qwen2ForCausalLM" else qkv_bias,
            qk_norm="head" if architecture == "Qwen3ForCausalLM" else None,
            window=window,
        )
        feed_forward = dense_mlp(b, f"{LAYER}.mlp", width, bias=config.flag("mlp_bias"))
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER)

    return b.model(b.layers(count, layer, windows))


def _windows(config: Config, architecture: str, count: int) -> list[int | None]:
    """Sliding window of every layer. Mistral: all layers; Qwen: layers from `max_window_layers` on, if switched on."""
    window = config.integer("sliding_window", default=None, least=1)
    if architecture == "LlamaForCausalLM" or window is None:
        return [None] * count
    if architecture == "MistralForCausalLM":
        return [window] * count
    if not config.flag("use_sliding_window"):
        return [None] * count
    full = config.integer("max_window_layers", default=count, least=0)
    return [None] * min(full, count) + [window] * max(count - full, 0)
