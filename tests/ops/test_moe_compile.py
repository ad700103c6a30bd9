"""The MXFP4 GEMM as compiled for Hopper keeps its promise: nothing moves between threads from load to product."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_unpacked_weights_go_straight_to_the_matrix_unit():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_moe.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) >= 8
    for row in rows:
        bn, _, bk, *_ = row["shape"]
        assert row["between_threads"] == 0 and not row["stack"], row
        assert row["wide_loads"] == bn * bk // (4 * 32 * 32), row  # 32 weights in 16 bytes, 4 warps of 32 lanes
        assert row["products"] == bn // 64 * bk // 16, row
        assert row["shared_bytes"] * row["programs"] <= 227 * 1024, row
