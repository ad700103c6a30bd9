"""Whole groups on the peer-to-peer kernels without a GPU: real ranks, shared memory, Triton's interpreter."""

import pytest

from shardwise.testing import run_processes

pytest.importorskip("triton")
ENV = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_two_ranks_agree_with_the_exact_sum_for_every_strategy_dtype_and_shape(tmp_path):
    run_processes(2, "p2p_on_cpu:conformance", str(tmp_path), timeout=500, env=ENV)


def test_four_ranks(tmp_path):
    run_processes(4, "p2p_on_cpu:conformance", str(tmp_path), timeout=500, env=ENV)


def test_groups_inside_hosts_have_the_kernels_where_the_world_spans_several(tmp_path):
    results = run_processes(4, "p2p_on_cpu:several_hosts", str(tmp_path), timeout=500, env=ENV)
    assert {told for told, _ in results} == {"p2p + gloo"}
    assert {why for _, why in results} == {"group world of 4: gloo (rank 2 runs on another host)"}


@pytest.mark.alone
def test_missing_ranks_aborts_and_broken_links_are_named(tmp_path):
    run_processes(2, "p2p_on_cpu:faults", str(tmp_path), timeout=500, env=ENV)
