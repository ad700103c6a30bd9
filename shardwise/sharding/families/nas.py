"""Nemotron NAS (DeciLM): heads and MLP width differ from layer to layer, either half of a layer may be missing."""

from typing import Any

from shardwise.sharding.blocks import attention, dense_mlp, head_axes
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec

LAYER = "model.layers.{layer}"
WIDTH_STEP = 256
FULL_ATTENTION = ("window_length", "num_sink_tokens", "sparsify")
"""Fields that would make attention another one."""


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5))
    count, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    if b.hidden_size % heads:
        raise config.error(("num_attention_heads",), heads, f"a divisor of hidden_size {b.hidden_size}")
    blocks = [Config(block, config.source) for block in config.list("block_configs", length=count, of=dict)]

    def layer(key: tuple[int, float]) -> Layer:
        group, multiplier = key
        halves: dict[str, Any] = {}
        if group:
            if heads % group:
                raise config.error(("n_heads_in_group",), group, f"a divisor of num_attention_heads {heads}")
            axes = (*head_axes(b, heads, heads // group), b.hidden_size // heads)
            halves["mixers"] = (attention(b, f"{LAYER}.self_attn", heads=axes, qkv_bias=config.flag("attention_bias")),)
            halves["mixer_norm"] = b.norm("mixer_norm", f"{LAYER}.input_layernorm")
        if multiplier:
            width = _width(multiplier, b.hidden_size)
            halves["feed_forward"] = (dense_mlp(b, f"{LAYER}.mlp", width, bias=config.flag("mlp_bias")),)
            halves["feed_forward_norm"] = b.norm("feed_forward_norm", f"{LAYER}.post_attention_layernorm")
        return Layer(**halves)

    return b.model(b.layers(layer, [_key(block) for block in blocks]))


def _key(block: Config) -> tuple[int, float]:
    """(query heads a KV head, MLP multiplier); 0 where that half is a no-op."""
    mixer, mlp = block.own("attention"), block.own("ffn")
    for half in (mixer, mlp):
        if half.flag("replace_with_linear"):
            raise half.error(("block_configs.replace_with_linear",), True, "false: such blocks are not supported")
    for name in FULL_ATTENTION:
        if mixer.has(name):
            raise mixer.error((f"block_configs.attention.{name}",), mixer.raw(name), "null: attention is to all tokens")
    group = 0 if mixer.flag("no_op") else mixer.integer("n_heads_in_group")
    return group, 0.0 if mlp.flag("no_op") else mlp.number("ffn_mult")


def _width(multiplier: float, hidden: int) -> int:
    """Two thirds of `multiplier * hidden`, up to a multiple of 256."""
    return -(-int(2 * multiplier * hidden / 3) // WIDTH_STEP) * WIDTH_STEP
