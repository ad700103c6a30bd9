"""DeepSeek V2, V3, R1, V3.1, V3.2, Kimi K2 and K2.5, GLM-5 (latent attention), DeepSeek-MoE and GLM-4.5 (GQA)."""

from shardwise.sharding.axes import Axis, LogicalAxis, along
from shardwise.sharding.blocks import attention, dense_mlp, pre_norm_layer
from shardwise.sharding.builder import Builder, Tensors
from shardwise.sharding.config import Config
from shardwise.sharding.latent import deepseek_moe, mla, sparse_layers
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.mtp import mtp_layers
from shardwise.sharding.spec import Block

GQA = ("DeepseekForCausalLM", "Glm4MoeForCausalLM")
INDEXED = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
UNCORRECTED = ("DeepseekForCausalLM", "DeepseekV2ForCausalLM")
SHARED_ENDS = ("GlmMoeDsaForCausalLM",)
"""Whose MTP layers are published without copies of the embedding and the head."""


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    nested = "language_model." if architecture == "KimiK25ForConditionalGeneration" else ""
    prefix = f"{nested}model."
    b = Builder(text, name, architecture, prefix=prefix, norm_eps=text.number("rms_norm_eps", default=1e-6))
    b.rope_partial = 0.5 if architecture == "Glm4MoeForCausalLM" else 1.0
    module, count = f"{prefix}layers.{{layer}}", text.integer("num_hidden_layers")
    mlp_bias = architecture == "DeepseekV2ForCausalLM" and text.flag("mlp_bias")
    indexers = [False] * count
    if architecture in INDEXED:
        types = text.list("indexer_types", default=None, length=count, of=str)
        indexers = [t == "full" for t in types] if types else [True] * count

    def layer(key: tuple[bool, bool]) -> Layer:
        sparse, indexer = key
        mixer: Block
        feed_forward: Block
        if architecture in GQA:
            # GLM-4.5 has biases at q, k and v only.
            mixer = attention(
                b,
                f"{module}.self_attn",
                qkv_bias=text.flag("attention_bias"),
                o_bias=False,
                qk_norm="head" if text.flag("use_qk_norm") else None,
            )
        else:
            mixer = mla(b, f"{module}.self_attn", indexer=indexer)
        if sparse:
            corrected = architecture not in UNCORRECTED
            feed_forward = deepseek_moe(b, f"{module}.mlp", correction=corrected, shared_bias=mlp_bias)
        else:
            feed_forward = dense_mlp(b, f"{module}.mlp", text.integer("intermediate_size"), bias=mlp_bias)
        return pre_norm_layer(b, mixer, feed_forward, prefix=module)

    layers = b.layers(layer, list(zip(sparse_layers(b, count), indexers, strict=True)))
    copies = () if architecture in SHARED_ENDS else _copied_ends(b, module)
    mtp_layers(b, text, layers[-1], module, first=count, more=copies)
    return b.model(layers, head_name=f"{nested}lm_head")


def _copied_ends(b: Builder, module: str) -> Tensors:
    """Embedding and head as an MTP layer holds them once more."""
    vocab = along(LogicalAxis(Axis.VOCAB, b.config.integer("vocab_size")))
    return (
        b.vector("mtp.embed.weight", f"{module}.embed_tokens.weight", vocab, b.hidden),
        b.vector("mtp.head.weight", f"{module}.shared_head.head.weight", vocab, b.hidden),
    )
