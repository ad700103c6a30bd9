"""The kernels of gated delta layers compile for Hopper, without spills and with sound descriptors."""

import importlib.util
import json
from pathlib import Path

import pytest
from compiling import printed

PROGRAM = Path(__file__).parent / "compile_delta.py"
SHARED_BYTES = 227 * 1024  # of one program on compute capability 9.0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_hopper_without_spills():
    rows = {row.pop("kernel"): row for row in map(json.loads, printed(PROGRAM))}
    assert list(rows) == ["step", "chunk", "chunk of small heads", "walk"]
    # The assembler of Triton 3.6 (12.8) takes a thread's number or an address for a zero in some kernels, a walk of 32
    # columns without stages and chunks of small heads with four warps, whose products then read elsewhere.
    assert all(row["shared"] <= SHARED_BYTES and not row["stack"] and not row["bad"] for row in rows.values()), rows
    assert rows["step"]["registers"] <= 255  # two programs of four warps share a multiprocessor
