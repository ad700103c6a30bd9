"""Multi-head latent attention and DeepSeek's expert layers, shared by DeepSeek, GLM-5 and Kimi."""

import math
from dataclasses import replace
from typing import Any

from shardwise.sharding.axes import Axis, LogicalAxis, along, fixed
from shardwise.sharding.blocks import dense_mlp, moe
from shardwise.sharding.builder import Builder, Tensors
from shardwise.sharding.spec import MlaAttention, Moe, Rope, Routing

UNNORMALIZED = "DeepseekV2ForCausalLM"
"""Its weights of experts are not made to sum to 1, whatever `norm_topk_prob` says."""


def mla(b: Builder, module: str, *, indexer: bool = False, **options: Any) -> MlaAttention:
    """Latent attention: the latent and its projections are whole on every rank, heads are cut."""
    c = b.config
    axis = LogicalAxis(Axis.Q_HEADS, c.integer("num_attention_heads"))
    nope, rope_dim, dv = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim"), c.integer("v_head_dim")
    q_rank, kv_rank = c.integer("q_lora_rank", default=None), c.integer("kv_lora_rank")
    q, latent, bias = along(axis, nope + rope_dim), fixed(kv_rank), c.flag("attention_bias")
    if q_rank is None:
        tensors = b.linear("q", f"{module}.q_proj", q, b.hidden)
    else:
        tensors = b.linear("q_a", f"{module}.q_a_proj", fixed(q_rank), b.hidden, bias_too=bias)
        tensors += (b.vector("q_a_norm.weight", f"{module}.q_a_layernorm.weight", fixed(q_rank)),)
        tensors += b.linear("q_b", f"{module}.q_b_proj", q, fixed(q_rank))
    tensors += b.linear("kv_a", f"{module}.kv_a_proj_with_mqa", fixed(kv_rank + rope_dim), b.hidden, bias_too=bias)
    tensors += (b.vector("kv_a_norm.weight", f"{module}.kv_a_layernorm.weight", latent),)
    tensors += b.linear("kv_b", f"{module}.kv_b_proj", along(axis, nope + dv), latent)
    if options.get("output_gate"):
        tensors += b.linear("gate", f"{module}.g_proj", along(axis, dv), b.hidden)
    tensors += b.linear("o", f"{module}.o_proj", b.hidden, along(axis, dv), bias_too=bias)
    index: dict[str, Any] = {}
    if indexer:
        index = {
            "index_heads": c.integer("index_n_heads"),
            "index_head_dim": c.integer("index_head_dim"),
            "index_topk": c.integer("index_topk"),
        }
        tensors += _indexer(
            b, f"{module}.indexer", index["index_heads"], index["index_head_dim"], q_rank or b.hidden_size
        )
    rope = options.pop("rope", None) or latent_rope(b, rope_dim)
    return MlaAttention(
        tensors,
        q_axis=axis,
        q_rank=q_rank,
        kv_rank=kv_rank,
        nope_dim=nope,
        rope_dim=rope_dim,
        v_head_dim=dv,
        scale=(nope + rope_dim) ** -0.5 * yarn_scale(rope) ** 2,
        rope=rope,
        norm_eps=b.norm_eps,
        **index,
        **options,
    )


def latent_rope(b: Builder, rope_dim: int) -> Rope:
    """Rotation of the separate rope part of each head, in neighbouring pairs unless `rope_interleave` is false."""
    return replace(b.rope(rope_dim, partial=1.0), interleaved=b.config.flag("rope_interleave", default=True))


def yarn_scale(rope: Rope) -> float:
    """YaRN's attention factor over all dims (`mscale_all_dim`), 1 without it."""
    fields = rope.parameters
    factor, mscale = fields.get("factor", 1.0), fields.get("mscale_all_dim", 0.0)
    if rope.kind != "yarn" or factor <= 1 or not mscale:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def _indexer(b: Builder, module: str, heads: int, dim: int, query_width: int) -> Tensors:
    """The sparse-attention indexer, whole on every rank: all ranks must choose the same tokens."""
    tensors = b.linear("index_q", f"{module}.wq_b", fixed(heads * dim), fixed(query_width))
    tensors += b.linear("index_k", f"{module}.wk", fixed(dim), b.hidden)
    tensors += (
        b.vector("index_k_norm.weight", f"{module}.k_norm.weight", fixed(dim)),
        b.vector("index_k_norm.bias", f"{module}.k_norm.bias", fixed(dim)),
    )
    return tensors + b.linear("index_weights", f"{module}.weights_proj", fixed(heads), b.hidden, plain=True)


def deepseek_moe(b: Builder, module: str, *, correction: bool, shared_bias: bool = False, **options: Any) -> Moe:
    """Routed and shared experts as DeepSeek names them: `gate`, `experts.N`, `shared_experts`."""
    c = b.config
    experts, width = c.integer("n_routed_experts", "num_experts"), c.integer("moe_intermediate_size")
    shared = width * c.integer("n_shared_experts", "num_shared_experts", default=0, least=0)
    beside = dense_mlp(b, f"{module}.shared_experts", shared, role="shared.", bias=shared_bias) if shared else None
    return moe(
        b,
        module,
        experts,
        width,
        deepseek_routing(b, experts, correction),
        correction="gate.e_score_correction_bias" if correction else None,
        shared=beside,
        **options,
    )


def deepseek_routing(b: Builder, experts: int, correction: bool) -> Routing:
    """Group-limited routing. `noaux_tc` corrects the choice by a bias and ranks groups by their two best scores."""
    c = b.config
    grouped = c.text("topk_method", default="noaux_tc" if correction else "greedy") != "greedy"
    groups = c.integer("n_group", "num_expert_group", default=1)
    if experts % groups:
        raise c.error(("n_group",), groups, f"a divisor of the {experts} experts")
    return Routing(
        top_k=c.integer("num_experts_per_tok", "num_experts_per_token", most=experts),
        score=c.text("scoring_func", "moe_router_activation_func", default="sigmoid" if correction else "softmax"),
        normalize=b.architecture != UNNORMALIZED and c.flag("norm_topk_prob", "moe_renormalize", default=correction),
        bias_correction=correction,
        groups=groups if grouped else 1,
        top_groups=c.integer("topk_group", default=1) if grouped else 1,
        group_score="top2_sum" if correction else "max",
        scale=c.number("routed_scaling_factor", default=1.0),
    )


def sparse_layers(b: Builder, count: int) -> list[bool]:
    """Which layers have experts: `mlp_layer_types`, or from `first_k_dense_replace` on every `moe_layer_freq`-th."""
    c = b.config
    if c.has("mlp_layer_types"):
        return [t == "sparse" for t in c.list("mlp_layer_types", length=count, of=str)]
    if isinstance(c.raw("moe_layer_freq"), list):
        return [bool(f) for f in c.list("moe_layer_freq", length=count, of=int)]
    first, step = c.integer("first_k_dense_replace", default=0, least=0), c.integer("moe_layer_freq", default=1)
    return [i >= first and i % step == 0 for i in range(count)]
