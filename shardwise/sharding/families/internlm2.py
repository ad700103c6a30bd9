"""InternLM2: one wqkv that keeps the query heads of a KV group together with their key and value head."""

from shardwise.sharding.axes import along, interleave
from shardwise.sharding.blocks import dense_mlp, heads_of, pre_norm_layer
from shardwise.sharding.builder import Builder
from shardwise.sharding.config import Config
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Attention

LAYER = "model.layers.{layer}"


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    b = Builder(config, name, architecture, norm_eps=config.number("rms_norm_eps", default=1e-5))
    biased = config.flag("bias")

    def layer(_: None) -> Layer:
        mlp = dense_mlp(b, f"{LAYER}.feed_forward", config.integer("intermediate_size"), names=("w1", "w3", "w2"))
        return pre_norm_layer(b, _attention(b, biased), mlp, prefix=LAYER, norms=("attention_norm", "ffn_norm"))

    layers = b.layers(layer, [None] * config.integer("num_hidden_layers"))
    return b.model(layers, embed_name="model.tok_embeddings", head_name="output")


def _attention(b: Builder, biased: bool) -> Attention:
    q_axis, kv_axis, d = heads_of(b)
    wqkv = interleave((q_axis, d), (kv_axis, d), (kv_axis, d))
    tensors = b.linear("qkv", f"{LAYER}.attention.wqkv", wqkv, b.hidden, bias_too=biased)
    tensors += b.linear("o", f"{LAYER}.attention.wo", b.hidden, along(q_axis, d), bias_too=biased)
    return Attention(
        tensors,
        q_axis=q_axis,
        kv_axis=kv_axis,
        head_dim=d,
        v_head_dim=d,
        scale=d**-0.5,
        rope=b.rope(d),
        norm_eps=b.norm_eps,
        qkv_grouped=True,
    )
