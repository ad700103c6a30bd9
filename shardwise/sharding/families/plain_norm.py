"""Cohere Command R / Aya (parallel residual) and StarCoder2 (biases, ungated MLP): layer norms and a tied head."""

from dataclasses import replace
from typing import Any

from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.families.llama import windows
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    cohere = architecture.startswith("Cohere")
    eps = config.number("layer_norm_eps", "norm_epsilon", default=1e-5)
    b = Builder(config, name, architecture, norm_kind="layer", norm_bias=not cohere, norm_eps=eps)
    b.rope_theta = 5e5 if architecture == "CohereForCausalLM" else b.rope_theta
    count, width = config.integer("num_hidden_layers"), config.integer("intermediate_size")
    if not cohere:
        biased = config.flag("use_bias", default=True)

        def coder(window: int | None) -> Layer:
            mixer = attention(b, f"{LAYER}.self_attn", qkv_bias=biased, window=window)
            mlp = dense_mlp(
                b,
                f"{LAYER}.mlp",
                width,
                activation=config.text("hidden_act", default="gelu_pytorch_tanh"),
                bias=biased,
                gated=False,
                names=("", "c_fc", "c_proj"),
            )
            return pre_norm_layer(b, mixer, mlp, prefix=LAYER)

        return b.model(b.layers(coder, windows(config, "MistralForCausalLM", count)), tied_default=True)

    def layer(window: int | None) -> Layer:
        return _cohere(b, config, width, window, architecture == "Cohere2ForCausalLM")

    layers = b.layers(layer, _cohere_windows(config, count, architecture))
    return b.model(layers, tied_default=True, head_multiplier=config.number("logit_scale", default=0.0625))


def _cohere(b: Builder, c: Config, width: int, window: int | None, second: bool) -> Layer:
    if c.flag("use_qk_norm"):
        raise c.error(("use_qk_norm",), True, "false: the per-head layer norms of Command R+ are not supported")
    options: dict[str, Any] = {"rope": None} if second and window is None else {}
    mixer = attention(b, f"{LAYER}.self_attn", qkv_bias=c.flag("attention_bias"), window=window, **options)
    if mixer.rope:
        mixer = replace(mixer, rope=replace(mixer.rope, interleaved=True))
    return Layer(
        mixers=(mixer,),
        feed_forward=(dense_mlp(b, f"{LAYER}.mlp", width),),
        mixer_norm=b.norm("mixer_norm", f"{LAYER}.input_layernorm"),
        parallel_residual=True,
    )


def _cohere_windows(c: Config, count: int, architecture: str) -> list[int | None]:
    """Command R has none; Command R7B has three windowed layers to one full, where `layer_types` does not say."""
    if architecture == "CohereForCausalLM":
        return [None] * count
    window, step = c.integer("sliding_window", default=4096), c.integer("sliding_window_pattern", default=4)
    types = c.list("layer_types", default=None, length=count, of=str)
    if types:
        return [window if kind == "sliding_attention" else None for kind in types]
    return [None if (i + 1) % step == 0 else window for i in range(count)]
