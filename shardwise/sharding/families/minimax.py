"""MiniMax M2 (QK-norm over all heads) and M3 (per-head QK-norm, block-sparse indexer, shared expert)."""

from typing import Any

from shardwise.sharding.axes import fixed
from shardwise.sharding.blocks import attention, dense_mlp, moe, pre_norm_layer
from shardwise.sharding.builder import Builder, Tensors
from shardwise.sharding.config import Config
from shardwise.sharding.latent import sparse_layers
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.spec import Moe, Routing

THETA = 5e6


def build(config: Config, name: str, architecture: str) -> ModelSpec:
    text = config.section("text_config")
    nested = "language_model." if architecture == "MiniMaxM3SparseForConditionalGeneration" else ""
    offset = 1.0 if text.flag("use_gemma_norm") else 0.0
    b = Builder(text, name, architecture, prefix=f"{nested}model.", norm_weight_offset=offset, rope_theta=THETA)
    b.norm_eps = text.number("rms_norm_eps", default=1e-6)
    module, count = f"{b.prefix}layers.{{layer}}", text.integer("num_hidden_layers")
    head_dim = text.integer("head_dim")
    b.rope_partial = text.integer("rotary_dim", default=head_dim) / head_dim

    def layer(key: tuple[bool, bool]) -> Layer:
        sparse, indexed = key
        mixer = attention(
            b,
            f"{module}.self_attn",
            qk_norm="head" if text.text("qk_norm_type", default="per_layer") == "per_head" else "all_heads",
            rope=b.rope(head_dim),
            extra=_indexer(b, text, f"{module}.self_attn") if indexed else (),
            **(_index_fields(text) if indexed else {}),
        )
        feed_forward = _experts(b, text, f"{module}.block_sparse_moe") if sparse else _dense(b, text, f"{module}.mlp")
        return pre_norm_layer(b, mixer, feed_forward, prefix=module)

    sparse = sparse_layers(b, count)
    indexed = text.own("sparse_attention_config").list(
        "sparse_attention_freq", default=[0] * count, length=count, of=int
    )
    layers = b.layers(layer, list(zip(sparse, map(bool, indexed), strict=True)))
    return b.model(layers, head_name=f"{nested}lm_head")


def _limits(c: Config) -> dict:
    return {"limit": c.number("swiglu_limit", default=None), "alpha": c.number("swiglu_alpha", default=None)}


def _dense(b: Builder, c: Config, module: str):
    return dense_mlp(b, module, c.integer("dense_intermediate_size", "intermediate_size"), **_limits(c))


def _experts(b: Builder, c: Config, module: str) -> Moe:
    experts = c.integer("num_local_experts")
    corrected = c.flag("use_routing_bias", default=True)
    own = () if b.architecture == "MiniMaxM2ForCausalLM" else ("moe_intermediate_size",)
    width = c.integer(*own, "intermediate_size")
    shared = c.integer("shared_intermediate_size", default=0, least=0)
    return moe(
        b,
        module,
        experts,
        width,
        Routing(
            top_k=c.integer("num_experts_per_tok", most=experts),
            score=c.text("scoring_func", default="sigmoid"),
            bias_correction=corrected,
            scale=c.number("routed_scaling_factor", default=1.0),
        ),
        names=("w1", "w3", "w2"),
        correction="e_score_correction_bias" if corrected else None,
        shared=dense_mlp(b, f"{module}.shared_experts", shared, role="shared.", **_limits(c)) if shared else None,
        **_limits(c),
    )


def _index_fields(c: Config) -> dict[str, Any]:
    sparse = c.own("sparse_attention_config")
    return {
        "index_heads": sparse.integer("sparse_num_index_heads", default=4),
        "index_head_dim": sparse.integer("sparse_index_dim", default=128),
        "index_topk": sparse.integer("sparse_topk_blocks", default=16),
        "index_block": sparse.integer("sparse_block_size", default=128),
    }


def _indexer(b: Builder, c: Config, module: str) -> Tensors:
    """The block-sparse indexer, whole on every rank."""
    fields = _index_fields(c)
    dim, heads = fields["index_head_dim"], fields["index_heads"]
    tensors = b.linear("index_q", f"{module}.index_q_proj", fixed(heads * dim), b.hidden)
    tensors += b.linear("index_k", f"{module}.index_k_proj", fixed(dim), b.hidden)
    return tensors + tuple(
        b.vector(f"index_{x}_norm.weight", f"{module}.index_{x}_norm.weight", fixed(dim)) for x in ("q", "k")
    )
