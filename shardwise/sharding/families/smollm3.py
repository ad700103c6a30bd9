"""SmolLM3: Llama's layers, of which every fourth has no rotation (NoPE)."""

from shardwise.sharding.blocks import attention, dense_mlp, heads_of, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"
THETA = 2e6


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-6), rope_theta=THETA)
    rope = b.rope(heads_of(b)[2])

    def layer(key: tuple[bool, int | None]) -> Layer:
        rotated, window = key
        mixer = attention(
            b,
            f"{LAYER}.self_attn",
            qkv_bias=config.flag("attention_bias"),
            rope=rope if rotated else None,
            window=window,
        )
        width = config.integer("intermediate_size")
        feed_forward = dense_mlp(b, f"{LAYER}.mlp", width, bias=config.flag("mlp_bias"))
        return pre_norm_layer(b, mixer, feed_forward, prefix=LAYER)

    return b.model(b.layers(layer, _layers(config)), tied_default=True)


def _layers(c: Config) -> list[tuple[bool, int | None]]:
    """Of every layer: whether it rotates, and its window. Layers without rotation have one, where windows are on."""
    count, every = c.integer("num_hidden_layers"), c.integer("no_rope_layer_interval", default=4)
    listed = c.list("no_rope_layers", default=None, length=count, of=int)
    rotated = [bool(flag) for flag in listed] if listed else [(i + 1) % every != 0 for i in range(count)]
    window = c.integer("sliding_window", default=None) if c.flag("use_sliding_window") else None
    kinds = c.list("layer_types", default=None, length=count, of=str)
    windowed = [kind == "sliding_attention" for kind in kinds] if kinds else [not flag for flag in rotated]
    return [(flag, window if inside else None) for flag, inside in zip(rotated, windowed, strict=True)]
