"""The Triton attention kernels compile for Hopper, within its shared memory and with few spilled registers."""

import importlib.util
import json
from pathlib import Path

import pytest
from compiling import printed

PROGRAM = Path(__file__).parent / "compile_attention.py"
SHARED_BYTES = 227 * 1024  # of one program on compute capability 9.0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_hopper_with_few_spills():
    rows = [json.loads(line) for line in printed(PROGRAM)]
    assert len(rows) == 18
    for row in rows:
        # Prefill of 256 elements a head was faster with a few spilled bytes than with a tile that spills none.
        spilled = 64 if row["kernel"].startswith("prefill 256") else 0
        assert row["shared"] <= SHARED_BYTES and row["stack"] <= spilled, row
        # Two decode programs share an SM, which the choice of splits counts on.
        if row["kernel"].startswith("decode"):
            assert 2 * row["shared"] <= SHARED_BYTES and row["registers"] <= 256, row
