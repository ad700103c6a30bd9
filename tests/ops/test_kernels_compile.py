"""Every Triton kernel that the operator table launches compiles to machine code for Hopper, also without a GPU.

A program of its own, because kernels of this test process are made for the interpreter where there is no device.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_triton_operator_compiles_for_hopper():
    command = [sys.executable, str(HERE / "compile_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    names = {"triton_rms_norm", "triton_cached_ssm", "triton_cached_causal_conv1d", "triton_rope_with_input_pos"}
    assert names <= set(result["operators"]) and result["kernels"] >= 40
