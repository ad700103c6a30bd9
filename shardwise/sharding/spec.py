"""The blocks that a model is described by: their tensors with logical axes, and their hyperparameters.

`model.py` puts them together. The planner, the checkpoint loader and the runtime's modules all read this; there is no
second description. All of it is frozen, compares by value and is free of torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from shardwise.sharding.axes import LogicalAxis
from shardwise.sharding.tensors import TensorSpec


@dataclass(frozen=True)
class Block:
    """Tensors that belong together. Subclasses add the hyperparameters of one kind of block."""

    tensors: tuple[TensorSpec, ...] = ()

    @cached_property
    def roles(self) -> dict[str, TensorSpec]:
        return {t.role: t for t in self.tensors}

    def map_tensors(self, change: Callable[[TensorSpec], TensorSpec]) -> Self:
        """The block with every tensor changed."""
        return replace(self, tensors=tuple(change(t) for t in self.tensors))


@dataclass(frozen=True, kw_only=True)
class Embedding(Block):
    """Role `embed.weight` [vocab, hidden]; positions that are learned: `positions.weight`."""

    vocab: int
    multiplier: float = 1.0
    learned_positions: int = 0


@dataclass(frozen=True, kw_only=True)
class Norm(Block):
    """Role `<where>.weight`, and `<where>.bias` for `layer`. `kind`: `rms` or `layer`."""

    kind: str = "rms"
    eps: float = 1e-6
    weight_offset: float = 0.0
    """Added to the stored weight: 1.0 for Gemma-like norms."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding. `scaling` keeps the published fields; `kind` is its name (`default`, `llama3`, `yarn`, ...)."""

    theta: float
    dim: int
    """Leading elements of a head that are rotated."""
    interleaved: bool = False
    """Pairs are neighbours (2i, 2i+1) instead of halves (i, i + dim / 2)."""
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    """Sorted (field, value) pairs: factor, low_freq_factor, original_max_position_embeddings, long_factor, ..."""

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.scaling)


@dataclass(frozen=True, kw_only=True)
class Attention(Block):
    """Softmax attention. Roles q, k, v, o (or fused qkv, kv), with `.bias`; q_norm, k_norm, v_norm; sinks.

    Head axes: `q_axis.units` query heads in `q_axis.groups` groups, one KV head a group.
    """

    q_axis: LogicalAxis
    kv_axis: LogicalAxis
    head_dim: int
    v_head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    """Positions that a query sees, itself included."""
    chunk: int | None = None
    """Attention stays inside chunks of this many positions (Llama 4)."""
    softcap: float | None = None
    sinks: bool = False
    qk_norm: str | None = None
    """`head`: over each head; `all_heads`: over all heads of q or k at once, which needs a mean across ranks."""
    qk_norm_after_rope: bool = False
    qk_norm_weighted: bool = True
    v_norm: bool = False
    norm_eps: float = 1e-6
    norm_weight_offset: float = 0.0
    output_gate: str | None = None
    """`per_element` (query projection twice as wide, [query | gate] in each head) or `per_head`: a sigmoid factor."""
    k_is_v: bool = False
    """No value projection: values are the keys before norm and rotation."""
    value_scale: float = 1.0
    key_multiplier: float = 1.0
    in_multiplier: float = 1.0
    out_multiplier: float = 1.0
    qk_clip: float | None = None
    temperature: tuple[float, float] | None = None
    """(floor, scale) of the position-dependent query temperature (Llama 4 layers without rotation)."""
    qkv_grouped: bool = False
    """The fused `qkv` lies group by group, each KV head's queries before it: [q.. k v | q.. k v | ...]."""
    index_heads: int = 0
    """Heads of an indexer (roles `index_*`, whole on every rank) that picks blocks of keys; 0: all keys."""
    index_head_dim: int = 0
    index_topk: int = 0
    """Blocks that are picked, of `index_block` keys each."""
    index_block: int = 0

    @property
    def heads(self) -> int:
        return self.q_axis.units

    @property
    def kv_heads(self) -> int:
        return self.kv_axis.units


@dataclass(frozen=True, kw_only=True)
class MlaAttention(Block):
    """Multi-head latent attention. Roles q (or q_a, q_a_norm, q_b), kv_a, kv_a_norm, kv_b, o, and `index_*`."""

    q_axis: LogicalAxis
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int
    scale: float
    rope: Rope | None
    norm_eps: float = 1e-6
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    output_gate: str | None = None

    @property
    def heads(self) -> int:
        return self.q_axis.units


@dataclass(frozen=True, kw_only=True)
class CompressedAttention(Block):
    """DeepSeek-V4 attention: one KV head, low-rank queries, grouped low-rank output, sinks, optional KV compression."""

    q_axis: LogicalAxis
    o_axis: LogicalAxis
    head_dim: int
    rope_dim: int
    q_rank: int
    o_rank: int
    scale: float
    rope: Rope | None
    window: int
    compress_ratio: int = 0
    norm_eps: float = 1e-6
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0

    @property
    def heads(self) -> int:
        return self.q_axis.units


@dataclass(frozen=True, kw_only=True)
class Mamba2(Block):
    """Mamba-2. Roles in_proj ([z | x | B | C | dt]), conv ([x | B | C]), A_log, D, dt_bias, norm, out_proj."""

    head_axis: LogicalAxis
    group_axis: LogicalAxis
    head_dim: int
    state: int
    conv_kernel: int
    conv_bias: bool
    gated_norm: bool
    norm_before_gate: bool = False
    norm_groups: int = 1
    norm_eps: float = 1e-5
    chunk: int = 256
    dt_limits: tuple[float, float] = (0.0, float("inf"))
    activation: str = "silu"
    in_multiplier: float = 1.0
    out_multiplier: float = 1.0
    segment_multipliers: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GatedDelta(Block):
    """Gated delta rule. Roles in_qkvz and in_ba (per key-head group) or in_qkv, in_z, in_b, in_a; conv, A_log, dt_bias,
    norm, out_proj. `kind`: `scalar` gates (Qwen), or `channel` gates (Kimi: q, k, v, f, g, b are projections)."""

    k_axis: LogicalAxis
    v_axis: LogicalAxis
    k_head_dim: int
    v_head_dim: int
    conv_kernel: int
    kind: str = "scalar"
    norm_eps: float = 1e-6
    activation: str = "silu"


@dataclass(frozen=True, kw_only=True)
class DenseMlp(Block):
    """Roles gate, up, down (or fused gate_up), with `.bias`. `gated` false: up and down only."""

    mlp_axis: LogicalAxis
    activation: str
    gated: bool = True
    gate_up_interleaved: bool = False
    limit: float | None = None
    alpha: float | None = None
    gate_multiplier: float = 1.0
    down_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a token picks its experts."""

    top_k: int
    score: str = "softmax"
    """`softmax`, `sigmoid` or `sqrtsoftplus`."""
    softmax_after_topk: bool = False
    normalize: bool = True
    bias_correction: bool = False
    """Role `router.correction` is added to the scores for the choice only."""
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    """`max` of a group's scores or `top2_sum`."""
    scale: float = 1.0
    scores_scale_input: bool = False
    """The score multiplies the expert's input, not its output (Llama 4)."""
    hash_layer: bool = False
    """Experts come from a table by token id (role `router.table`), not from scores."""


@dataclass(frozen=True, kw_only=True)
class Moe(Block):
    """Routed experts. Roles router.weight; per expert or stacked gate, up, down or gate_up; the shared expert is a
    `DenseMlp` with its own roles. Stacked tensors carry the expert axis as their first dim."""

    expert_axis: LogicalAxis
    mlp_axis: LogicalAxis
    routing: Routing
    activation: str
    gated: bool = True
    stacked: bool = False
    transposed: bool = False
    """Stacked tensors are [E, in, out] instead of [E, out, in]."""
    gate_up_interleaved: bool = False
    limit: float | None = None
    alpha: float | None = None
    shared: DenseMlp | None = None
    shared_gated: bool = False
    """Role shared_gate.weight: a sigmoid of it scales the shared expert's output."""
    latent: int = 0
    """Experts work in this smaller width between roles latent_down and latent_up; 0: at hidden size."""

    @property
    def all_tensors(self) -> tuple[TensorSpec, ...]:
        return self.tensors + (self.shared.tensors if self.shared else ())

    def map_tensors(self, change: Callable[[TensorSpec], TensorSpec]) -> Self:
        shared = self.shared.map_tensors(change) if self.shared else None
        return replace(self, tensors=tuple(change(t) for t in self.tensors), shared=shared)


@dataclass(frozen=True, kw_only=True)
class Head(Block):
    """Role `head.weight` [vocab, hidden]; none where `tied`: the embedding's tensor is used."""

    tied: bool
    softcap: float | None = None
    multiplier: float = 1.0
