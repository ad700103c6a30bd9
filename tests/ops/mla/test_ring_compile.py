"""Attention's ring kernel as compiled for Hopper keeps its promises: what the interpreter cannot show."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_products_run_side_by_side_from_tiles_that_fit_a_multiprocessor():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_ring.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["heads"] for row in rows] == [16, 128]
    for row in rows:
        assert not row["serialized"] and not row["stack"], row
        assert row["shared_bytes"] <= 227 * 1024, row
        # 64 keys by 576 columns in copies of 64; scores in steps of 16 columns, values in both halves of 16 keys
        assert row["tiles_by_tensor_memory"] == 9, row
        assert row["products"] == 36 + 2 * 4 * (4 if row["heads"] == 16 else 2), row
