import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.sharding.layout import ParallelLayout


@given(st.integers(1, 8), st.integers(1, 4), st.data())
def test_ranks_and_coordinates_are_one_to_one(tp, attn_dp, data):
    world = tp * attn_dp
    ep = data.draw(st.sampled_from([e for e in range(1, world + 1) if world % e == 0]))
    layout = ParallelLayout(tp, attn_dp, moe_ep=ep)
    seen = [layout.coordinates(r) for r in range(world)]
    assert len({(c.tp, c.attn_dp) for c in seen}) == world
    assert len({(c.moe_tp, c.moe_ep) for c in seen}) == world
    assert [c.tp for c in seen[:tp]] == list(range(tp))
    assert [c.moe_ep for c in seen[:ep]] == list(range(ep))
    along = layout.along(range(tp), range(layout.moe_tp), range(ep))
    assert list(along) == [(c.tp, c.moe_tp, c.moe_ep) for c in seen]


def test_moe_tp_is_what_is_left():
    assert ParallelLayout(8, moe_ep=4).moe_tp == 2
    assert ParallelLayout(8).moe_tp == 8
    assert ParallelLayout(2, 4, moe_ep=8).moe_tp == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 2, "moe_ep": 8}, "--attn-dp 4"),
        ({"tp": 4, "moe_ep": 3}, "legal are 1, 2, 4"),
        ({"tp": 4, "moe_tp": 2, "moe_ep": 1}, "leave --moe-tp out, so that it is 4"),
        ({"tp": 4, "moe_tp": 4, "moe_ep": 2}, "moe_tp * ep = 4 * 2 = 8 != 4: give --attn-dp 2"),
        ({"tp": 0}, "tp is 0, expected at least 1"),
        ({"tp": 2, "attn_dp": 10**12}, "= 2000000000000 ranks, expected at most 131072"),
    ],
)
def test_a_grid_that_does_not_close_says_the_equation_and_an_offer(sizes, words):
    with pytest.raises(ValueError) as error:
        ParallelLayout(**sizes)
    assert words in str(error.value)


def test_sizes_are_integers():
    with pytest.raises(TypeError, match="tp is 2.0, expected an integer"):
        ParallelLayout(tp=2.0)


def test_ranks_outside_of_the_world_are_refused():
    with pytest.raises(ValueError, match="rank 4 is not in"):
        ParallelLayout(4).coordinates(4)
