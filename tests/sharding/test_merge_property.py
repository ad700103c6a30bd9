"""Random tensors on random axes: the parts of all ranks, put back where they came from, are the tensor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.sharding.axes import Axis, LogicalAxis, along, concat, fixed, interleave
from shardwise.sharding.cuts import IllegalCut
from shardwise.sharding.cutting import Cutting, IllegalLayout
from shardwise.sharding.experts import place_experts
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.parts import check_parts
from shardwise.sharding.shards import Cuts
from shardwise.sharding.tensors import TensorSpec

PAIRS = ((Axis.Q_HEADS, Axis.KV_HEADS), (Axis.SSM_HEADS, Axis.SSM_GROUPS), (Axis.DELTA_V_HEADS, Axis.DELTA_K_HEADS))


@st.composite
def dims(draw, mlp_axis):
    """A dim on one mesh axis: plain, fused, interleaved, coarse or uncut."""
    kinds = ["fixed", "mlp", "coarse"] + (["heads", "fused", "interleaved"] if mlp_axis is Axis.MLP else [])
    kind = draw(st.sampled_from(kinds))
    size = draw(st.integers(1, 4))
    if kind == "fixed":
        return fixed(draw(st.integers(1, 6)))
    mlp = along(LogicalAxis(mlp_axis, draw(st.integers(1, 30))), size)
    if kind == "mlp":
        return mlp
    if kind == "coarse":
        return mlp.coarse(draw(st.integers(1, 5)))
    names, groups = draw(st.sampled_from(PAIRS)), draw(st.integers(1, 5))
    many = LogicalAxis(names[0], groups * draw(st.integers(1, 4)), groups)
    few = LogicalAxis(names[1], groups, groups)
    if kind == "heads":
        return along(many, size)
    return concat(along(many, size), along(few, 2)) if kind == "fused" else interleave((many, size), (few, 2), (few, 1))


@st.composite
def specs(draw):
    """A tensor with at most one dim on tp, or one on moe_tp and an expert dim."""
    routed = draw(st.booleans())
    shape = [fixed(draw(st.integers(1, 4))), draw(dims(Axis.EXPERT_MLP if routed else Axis.MLP))]
    if draw(st.booleans()):
        shape.reverse()
    if routed:
        shape.insert(0, along(LogicalAxis(Axis.EXPERTS, draw(st.integers(1, 9)))))
    return TensorSpec("w", "w", tuple(shape), "F32")


def parts(spec, cuts):
    return [cuts.shard(spec, cuts.layout.coordinates(r), "w") for r in range(cuts.layout.world)]


def indices(ranges):
    return np.ix_(*([i for a, b in dim for i in range(a, b)] for dim in ranges))


@settings(max_examples=300)
@given(specs(), st.integers(1, 6), st.integers(1, 3), st.data())
def test_shard_and_merge_is_the_identity(spec, tp, attn_dp, data):
    world = tp * attn_dp
    ep = data.draw(st.sampled_from([e for e in range(1, world + 1) if world % e == 0]))
    layout = ParallelLayout(tp, attn_dp, moe_ep=ep)
    pad = data.draw(st.sampled_from([frozenset(), frozenset({Axis.MLP, Axis.EXPERT_MLP})]))
    try:
        by_axis, _ = Cutting((spec,), pad).under(layout)
    except (IllegalLayout, IllegalCut) as error:
        assert "ranks" in str(error)
        return
    experts = [a for a in by_axis if a.axis is Axis.EXPERTS]
    cuts = Cuts(layout, by_axis, {a: place_experts(a, ep) for a in experts})
    check_parts((spec,), cuts)
    full = np.arange(np.prod(spec.shape), dtype=np.float32).reshape(spec.shape)
    merged = np.full_like(full, np.nan)
    for shard in parts(spec, cuts):
        piece = full[indices(shard.ranges)]
        assert all(n <= m for n, m in zip(piece.shape, shard.local_shape, strict=True))
        assert piece.shape == shard.local_shape or pad
        merged[indices(shard.ranges)] = piece
    assert np.array_equal(merged, full)


@given(dims(Axis.MLP), st.integers(1, 6))
def test_attention_groups_hold_the_same(dim, tp):
    spec = TensorSpec("w", "w", (dim,), "F32")
    try:
        by_axis, _ = Cutting((spec,)).under(ParallelLayout(tp, 2))
    except IllegalLayout:
        return
    found = parts(spec, Cuts(ParallelLayout(tp, 2), by_axis, {}))
    assert found[:tp] == found[tp:]


def test_a_tensor_on_both_grids_is_refused_by_the_self_check():
    axes = LogicalAxis(Axis.EXPERTS, 4), LogicalAxis(Axis.MLP, 4)
    spec = TensorSpec("w", "w", tuple(map(along, axes)), "F32")
    layout = ParallelLayout(2, moe_ep=2)
    by_axis, _ = Cutting((spec,)).under(layout)
    with pytest.raises(AssertionError, match="of two grids"):
        check_parts((spec,), Cuts(layout, by_axis, {axes[0]: place_experts(axes[0], 2)}))
