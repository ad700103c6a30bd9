"""MoE kernels as compiled for Hopper: MXFP4 words become products without moving between threads; nothing spills."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compiled_rows(program):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_unpacked_weights_go_straight_to_the_matrix_unit():
    rows = compiled_rows("compile_moe.py")
    assert len(rows) >= 8
    for row in rows:
        bn, _, bk, *_ = row["shape"]
        assert row["between_threads"] == 0 and not row["stack"], row
        assert row["wide_loads"] == bn * bk // (4 * 32 * 32), row  # 32 weights in 16 bytes, 4 warps of 32 lanes
        assert row["products"] == bn // 64 * bk // 16, row
        assert row["shared_bytes"] * row["programs"] <= 227 * 1024, row


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_with_given_routing_stay_in_registers_and_fit_a_multiprocessor():
    rows = compiled_rows("compile_grouped.py")
    for name, row in rows.items():
        assert not row["stack"] and row["shared_bytes"] * row["programs"] <= 227 * 1024, (name, row)
        assert (row["products"] > 0 and row["tiles_by_tensor_memory"] > 0) == (name != "few"), (name, row)
