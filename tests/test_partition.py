import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.partition import extent, lengths, owner


@given(st.integers(0, 10_000), st.integers(1, 200))
def test_parts_tile_the_length_in_order_with_the_remainder_first(n, parts):
    ranges = [extent(n, parts, i) for i in range(parts)]
    assert ranges[0][0] == 0 and ranges[-1][1] == n
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert tuple(sizes) == lengths(n, parts)


@given(st.integers(1, 5_000), st.integers(1, 100), st.data())
def test_owner_is_the_part_that_holds_the_unit(n, parts, data):
    unit = data.draw(st.integers(0, n - 1))
    start, stop = extent(n, parts, owner(n, parts, unit))
    assert start <= unit < stop


@pytest.mark.parametrize("arguments", [(-1, 2, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)])
def test_impossible_parts_are_refused(arguments):
    with pytest.raises(ValueError, match="need n >= 0"):
        extent(*arguments)
