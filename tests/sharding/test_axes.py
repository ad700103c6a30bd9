"""The axis algebra by properties: parts cover an axis, overlap only where ranks share, and fused dims follow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.partition import lengths
from shardwise.sharding.axes import Axis, LogicalAxis, along, concat, fixed, interleave, merge, span
from shardwise.sharding.cuts import Cut, CutKind, IllegalCut
from shardwise.sharding.experts import place_experts

GROUPED = [(Axis.Q_HEADS, Axis.KV_HEADS), (Axis.SSM_HEADS, Axis.SSM_GROUPS), (Axis.DELTA_V_HEADS, Axis.DELTA_K_HEADS)]


@st.composite
def cuts(draw):
    """A legal cut of a random axis, with grain and padding."""
    groups = draw(st.integers(0, 12))
    name = draw(st.sampled_from([pair[0] for pair in GROUPED] if groups else [Axis.MLP, Axis.VOCAB, Axis.EXPERT_MLP]))
    units = groups * draw(st.integers(1, 9)) if groups else draw(st.integers(1, 400))
    grain = 1 if groups else draw(st.integers(1, 40))
    axis = LogicalAxis(name, units, groups)
    most = axis.units if groups else -(-units // grain)
    return Cut(axis, draw(st.integers(1, min(most, 24))), grain, not groups and draw(st.booleans()))


def shares(cut):
    return [cut.share(i) for i in range(cut.parts)]


@given(cuts())
def test_parts_cover_the_axis_exactly_once(cut):
    ranges = sorted(r for share in shares(cut) for r in share.ranges)
    assert merge(ranges) == ((0, cut.axis.units),)
    assert span(ranges) == cut.axis.units


@given(cuts())
def test_parts_are_within_one_cut_unit_of_each_other(cut):
    held = [share.length for share in shares(cut)]
    if cut.axis.groups:
        assert max(held) - min(held) <= cut.axis.per_group
    else:
        bundles = [-(-length // cut.grain) for length in held]
        assert max(bundles) - min(bundles) <= 1
    if cut.padded:
        assert len(set(held)) == 1 and held[0] % cut.grain == 0


@given(cuts())
def test_cuts_lie_on_the_grain(cut):
    for share in shares(cut):
        for start, stop in share.ranges:
            assert start % cut.grain == 0
            assert stop % cut.grain == 0 or stop == cut.axis.units


@given(
    st.sampled_from(GROUPED),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 40),
)
def test_every_rank_has_an_integral_ratio_of_heads_to_shared_heads(pair, groups, ratio, parts):
    heads, shared = LogicalAxis(pair[0], groups * ratio, groups), LogicalAxis(pair[1], groups, groups)
    try:
        cut = Cut(heads, parts)
    except IllegalCut as error:
        assert -(-parts // groups) > ratio and f"{parts} ranks" in str(error)
        return
    with_shared = Cut(shared, parts)
    for i in range(parts):
        q, kv = cut.share(i), with_shared.share(i)
        assert q.length >= 1 and kv.length >= 1
        assert q.length % kv.length == 0
        assert {u // ratio for a, b in q.ranges for u in range(a, b)} == {u for a, b in kv.ranges for u in range(a, b)}
    assert merge(r for s in shares(with_shared) for r in s.ranges) == ((0, groups),)


@pytest.mark.parametrize(
    ("heads", "kv", "ranks", "q_lengths", "kv_lengths"),
    [
        (9, 3, 2, [6, 3], [2, 1]),
        (9, 3, 3, [3, 3, 3], [1, 1, 1]),
        (48, 6, 8, [4, 4, 4, 4, 8, 8, 8, 8], [1] * 8),
        (40, 10, 4, [12, 12, 8, 8], [3, 3, 2, 2]),
        (40, 5, 8, [4, 4, 4, 4, 4, 4, 8, 8], [1] * 8),
        (64, 4, 8, [8] * 8, [1] * 8),
        (14, 2, 3, [4, 3, 7], [1, 1, 1]),
    ],
)
def test_heads_dealt_by_hand(heads, kv, ranks, q_lengths, kv_lengths):
    q = Cut(LogicalAxis(Axis.Q_HEADS, heads, kv), ranks)
    k = Cut(LogicalAxis(Axis.KV_HEADS, kv, kv), ranks)
    assert [s.length for s in shares(q)] == q_lengths
    assert [s.length for s in shares(k)] == kv_lengths


def test_more_ranks_than_heads_is_refused_with_the_numbers():
    with pytest.raises(IllegalCut, match="4 q_heads in 2 groups on 5 ranks: 3 ranks would share the 2 of one group"):
        Cut(LogicalAxis(Axis.Q_HEADS, 4, 2), 5)
    with pytest.raises(IllegalCut, match="90 blocks|too few"):
        Cut(LogicalAxis(Axis.EXPERT_MLP, 2880), 91, 32)


def test_kinds():
    mlp = LogicalAxis(Axis.MLP, 10)
    assert Cut(mlp, 1).kind is CutKind.WHOLE
    assert Cut(mlp, 5).kind is CutKind.EVEN
    assert Cut(mlp, 4).kind is CutKind.UNEVEN
    assert Cut(mlp, 4, padded=True).kind is CutKind.PAD
    assert Cut(LogicalAxis(Axis.KV_HEADS, 2, 2), 8).kind is CutKind.REPLICATE


@st.composite
def fused(draw):
    """(dim, shares of the parts by axis) of a dim fused of several axes that share groups, in either order."""
    groups, ratio, parts = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    if -(-parts // groups) > ratio:
        parts = 1
    q, kv = LogicalAxis(Axis.Q_HEADS, groups * ratio, groups), LogicalAxis(Axis.KV_HEADS, groups, groups)
    sizes = draw(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
    together = list(zip((q, kv, kv), sizes, strict=True))
    dim = concat(*(along(a, n) for a, n in together)) if draw(st.booleans()) else interleave(*together)
    return dim, {a: Cut(a, parts) for a in (q, kv)}, parts, together


@given(fused())
def test_a_fused_dim_is_covered_and_each_part_holds_its_share_of_every_segment(case):
    dim, by_axis, parts, together = case
    everything = []
    for i in range(parts):
        ranges, length = dim.local(lambda a, i=i: by_axis[a].share(i))
        assert length == span(ranges) == sum(by_axis[a].share(i).length * n for a, n in together)
        everything += ranges
    assert merge(everything) == ((0, dim.length),)


@given(cuts(), st.integers(1, 8), st.integers(1, 64))
def test_scales_keep_every_block_of_their_weights(cut, size, per):
    weights, scales = along(cut.axis, size), along(cut.axis, size).coarse(per)
    for i in range(cut.parts):
        held, _ = weights.local(lambda _, i=i: cut.share(i))
        kept, _ = scales.local(lambda _, i=i: cut.share(i))
        needed = {e // per for a, b in held for e in (a, b - 1)}
        assert needed <= {s for a, b in kept for s in range(a, b)}
        assert span(kept) <= sum(-(-(b - a) // per) + 1 for a, b in held)


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_every_expert_is_on_a_rank_and_none_twice_on_one(experts, ranks, data):
    ranks = min(ranks, experts)
    redundant = data.draw(st.integers(0, min(experts * (ranks - 1), 30)))
    load = data.draw(st.none() | st.lists(st.floats(0, 1e6), min_size=experts, max_size=experts).map(tuple))
    placement = place_experts(LogicalAxis(Axis.EXPERTS, experts), ranks, redundant, load)
    assert {e for held in placement for e in held} == set(range(experts))
    assert [len(held) for held in placement] == list(lengths(experts + redundant, ranks))
    assert all(len(set(held)) == len(held) and list(held) == sorted(held) for held in placement)


def test_copies_go_to_the_busiest_expert():
    load = (1.0, 1.0, 90.0, 1.0)
    placement = place_experts(LogicalAxis(Axis.EXPERTS, 4), 2, 2, load)
    assert sum(2 in held for held in placement) == 2


def test_impossible_copies_are_refused():
    with pytest.raises(ValueError, match="at most 4 copies"):
        place_experts(LogicalAxis(Axis.EXPERTS, 4), 2, 5)
    with pytest.raises(ValueError, match="3 numbers, the model has 4"):
        place_experts(LogicalAxis(Axis.EXPERTS, 4), 2, 1, (1.0, 2.0, 3.0))


def test_a_dim_without_axis_is_whole_everywhere():
    assert fixed(7).local(lambda axis: None) == (((0, 7),), 7)
