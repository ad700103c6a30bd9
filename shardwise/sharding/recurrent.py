"""Mamba-2 and gated-delta mixers in Hugging Face names, shared by the hybrid families."""

from typing import Any

from shardwise.sharding.axes import Axis, LogicalAxis, along, concat, fixed, interleave
from shardwise.sharding.builder import Builder
from shardwise.sharding.spec import GatedDelta, Mamba2


def mamba2(
    b: Builder,
    module: str,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    kernel: int,
    conv_bias: bool,
    proj_bias: bool,
    out_bias: bool | None = None,
    gated_norm: bool = True,
    **options: Any,
) -> Mamba2:
    """A Mamba-2 mixer. in_proj is [z | x | B | C | dt], the convolution runs over [x | B | C].

    `out_bias`: of out_proj, where it is not `proj_bias`.
    """
    if heads % groups:
        raise b.config.error(("n_groups",), groups, f"a divisor of the {heads} SSM heads")
    head_axis = LogicalAxis(Axis.SSM_HEADS, heads, groups)
    group_axis = LogicalAxis(Axis.SSM_GROUPS, groups, groups)
    inner, bc, per_head = along(head_axis, head_dim), along(group_axis, state), along(head_axis)
    conv = concat(inner, bc, bc)
    tensors = b.linear("in_proj", f"{module}.in_proj", concat(inner, conv, per_head), b.hidden, bias_too=proj_bias)
    tensors += (b.vector("conv.weight", f"{module}.conv1d.weight", conv, fixed(1), fixed(kernel)),)
    if conv_bias:
        tensors += (b.vector("conv.bias", f"{module}.conv1d.bias", conv),)
    tensors += tuple(b.vector(role, f"{module}.{role}", per_head) for role in ("A_log", "D", "dt_bias"))
    if gated_norm:
        tensors += (b.vector("norm.weight", f"{module}.norm.weight", inner),)
    out_bias = proj_bias if out_bias is None else out_bias
    tensors += b.linear("out_proj", f"{module}.out_proj", b.hidden, inner, bias_too=out_bias)
    return Mamba2(
        tensors,
        head_axis=head_axis,
        group_axis=group_axis,
        head_dim=head_dim,
        state=state,
        conv_kernel=kernel,
        conv_bias=conv_bias,
        gated_norm=gated_norm,
        norm_groups=groups,
        norm_eps=b.norm_eps,
        **options,
    )


def qwen_delta(b: Builder, module: str, *, fused: bool) -> GatedDelta:
    """Qwen's gated delta net. `fused`: in_proj_qkvz and in_proj_ba hold, key head by key head, its q, k, v.. and z..
    (b.. and a..); otherwise in_proj_qkv is [q | k | v] and z, b, a are projections of their own.
    """
    c = b.config
    k_heads, v_heads = c.integer("linear_num_key_heads"), c.integer("linear_num_value_heads")
    dk, dv = c.integer("linear_key_head_dim"), c.integer("linear_value_head_dim")
    kernel = c.integer("linear_conv_kernel_dim")
    if v_heads % k_heads:
        raise c.error(("linear_num_value_heads",), v_heads, f"a multiple of linear_num_key_heads {k_heads}")
    k_axis = LogicalAxis(Axis.DELTA_K_HEADS, k_heads, k_heads)
    v_axis = LogicalAxis(Axis.DELTA_V_HEADS, v_heads, k_heads)
    k, v = along(k_axis, dk), along(v_axis, dv)
    if fused:
        qkvz = interleave((k_axis, dk), (k_axis, dk), (v_axis, dv), (v_axis, dv))
        tensors = b.linear("in_qkvz", f"{module}.in_proj_qkvz", qkvz, b.hidden)
        tensors += b.linear("in_ba", f"{module}.in_proj_ba", interleave((v_axis, 1), (v_axis, 1)), b.hidden)
    else:
        tensors = b.linear("in_qkv", f"{module}.in_proj_qkv", concat(k, k, v), b.hidden)
        tensors += b.linear("in_z", f"{module}.in_proj_z", v, b.hidden)
        tensors += b.linear("in_b", f"{module}.in_proj_b", along(v_axis), b.hidden)
        tensors += b.linear("in_a", f"{module}.in_proj_a", along(v_axis), b.hidden)
    tensors += (
        b.vector("conv.weight", f"{module}.conv1d.weight", concat(k, k, v), fixed(1), fixed(kernel)),
        b.vector("A_log", f"{module}.A_log", along(v_axis)),
        b.vector("dt_bias", f"{module}.dt_bias", along(v_axis)),
        b.vector("norm.weight", f"{module}.norm.weight", fixed(dv)),
    )
    tensors += b.linear("out_proj", f"{module}.out_proj", b.hidden, v)
    return GatedDelta(
        tensors,
        k_axis=k_axis,
        v_axis=v_axis,
        k_head_dim=dk,
        v_head_dim=dv,
        conv_kernel=kernel,
        norm_eps=b.norm_eps,
        activation=c.text("hidden_act", default="silu"),
    )


def kimi_delta(b: Builder, module: str, *, heads: int, head_dim: int, kernel: int) -> GatedDelta:
    """Kimi delta attention: q, k, v on their own, low-rank decay (f) and output gate (g), one beta a head."""
    k_axis = LogicalAxis(Axis.DELTA_K_HEADS, heads, heads)
    axis = LogicalAxis(Axis.DELTA_V_HEADS, heads, heads)
    inner, rank = along(axis, head_dim), fixed(head_dim)
    keys = along(k_axis, head_dim)
    tensors = b.linear("q", f"{module}.q_proj", keys, b.hidden)
    tensors += b.linear("k", f"{module}.k_proj", keys, b.hidden)
    tensors += b.linear("v", f"{module}.v_proj", inner, b.hidden)
    tensors += tuple(
        b.vector(f"{role}_conv.weight", f"{module}.{role}_conv1d.weight", dim, fixed(1), fixed(kernel))
        for role, dim in (("q", keys), ("k", keys), ("v", inner))
    )
    tensors += (b.vector("A_log", f"{module}.A_log", fixed(1), fixed(1), along(axis), fixed(1), dtype="F32"),)
    tensors += (b.vector("dt_bias", f"{module}.dt_bias", inner, dtype="F32"),)
    for role in ("f", "g"):
        tensors += b.linear(f"{role}_a", f"{module}.{role}_a_proj", rank, b.hidden)
        tensors += b.linear(f"{role}_b", f"{module}.{role}_b_proj", inner, rank)
    tensors += b.linear("b", f"{module}.b_proj", along(axis), b.hidden)
    tensors += (b.vector("norm.weight", f"{module}.o_norm.weight", rank),)
    tensors += b.linear("out_proj", f"{module}.o_proj", b.hidden, inner)
    return GatedDelta(
        tensors,
        k_axis=k_axis,
        v_axis=axis,
        k_head_dim=head_dim,
        v_head_dim=head_dim,
        conv_kernel=kernel,
        kind="channel",
        norm_eps=b.norm_eps,
    )
