"""Products with 4-bit weights compile for Hopper as they are meant to, also without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
from compiling import printed


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_codes_become_operands_in_registers_and_nothing_lies_in_local_memory():
    lines = printed(Path(__file__).parent / "compile_int4.py", timeout=500)
    kernels, failures = map(json.loads, lines[-2:])
    assert failures == [] and len(kernels) == 7
    for kernel in kernels:
        assert kernel["products"] and not kernel["stored_before"] and not kernel["stack"], kernel
