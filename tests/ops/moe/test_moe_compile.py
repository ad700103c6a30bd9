"""MoE kernels as compiled for Hopper keep their promises: what the interpreter cannot show."""

import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from compiling import printed

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@functools.cache
def rows_of(program):
    """The JSON list that a program of this folder prints."""
    return json.loads(printed(HERE / program, timeout=500)[-1])


def test_unpacked_weights_go_straight_to_the_matrix_unit():
    rows = rows_of("compile_moe.py")
    assert len(rows) >= 8
    for row in rows:
        bn, bt, bk, *_ = row["shape"]
        assert row["between_threads"] == 0 and not row["stack"], row
        assert row["shared_bytes"] * row["programs"] <= 227 * 1024, row
        if row["slabs"]:  # a slab's words in one copy and one load, eight tokens in two
            assert row["asynchronous_copies"] == row["slabs"] and row["products"] == bt // 2 * row["slabs"], row
            assert row["wide_loads"] == row["slabs"] + bt // 4 * row["steps"] and row["barriers"] <= 2, row
        elif bn == 16:  # a tile's words in one load, eight tokens in two: nothing passes through shared memory
            tiles = row["products"] // 4
            assert tiles >= 5 and row["wide_loads"] == 3 * tiles and row["shared_bytes"] <= 16, row
        else:  # 32 weights in 16 bytes
            assert row["wide_loads"] == bn * bk // (32 * 32 * row["warps"]), row
            assert row["products"] == bn // (16 * row["warps"]) * bk // 16 * (2 if row["side"] else 1), row


def test_no_product_runs_into_the_next_round_which_unpacks_into_its_registers():
    rows = [row for row in rows_of("compile_moe.py") if row["shape"][0] > 16]
    assert rows and all(row["products"] > 0 for row in rows)
    assert [row for row in rows if row["in_flight"]] == []


def test_products_do_not_wait_for_each_other():
    rows = [row for row in rows_of("compile_moe.py") if row["shape"][0] > 16]
    assert [row for row in rows if row["serialized"]] == []


def test_no_reduction_runs_over_lanes_with_a_gap():
    rows = rows_of("compile_routing.py")
    assert len(rows) >= 8 and all(row["reductions"] for row in rows)
    assert [row for row in rows if row["gaps"]] == []


def test_kernels_with_given_routing_stay_in_registers_and_fit_a_multiprocessor():
    rows = rows_of("compile_grouped.py")
    roles = importlib.metadata.version("triton").startswith("3.6.")  # for others there are no specialised kernels
    assert len(rows) >= (10 if roles else 8)
    for row in rows:
        few = row["kernel"].startswith("few")
        assert not row["stack"] and row["gaps"] == [], row
        assert row["shared_bytes"] * row["programs"] <= 227 * 1024, row
        assert (row["products"] > 0 and row["tiles_by_tensor_memory"] > 0) == (not few), row
