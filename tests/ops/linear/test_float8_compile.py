"""Products with float8 weights compile for Hopper as they are meant to, also without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
from compiling import printed


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_codes_are_converted_in_pairs_and_nothing_lies_in_local_memory():
    lines = printed(Path(__file__).parent / "compile_float8.py", timeout=500)
    kernels, failures = map(json.loads, lines[-2:])
    assert failures == [] and len(kernels) == 4
    for kernel in kernels:
        assert kernel["pairs_from_e4m3"] >= 32 and kernel["single_to_bf16"] == 0 and not kernel["stack"]
    assert [kernel["products"] > 0 for kernel in kernels] == [False, False, True, True]
