"""Without a CUDA device, Triton kernels of this test process run in Triton's interpreter.

Triton decides when a kernel is decorated, so this must happen before anything imports triton. The environment
variable is taken back at once and Triton's own switch keeps the choice: processes that tests start see neither, and
behave as on a user's machine. Inside this process the only difference is that `triton_*` operators are available
for CPU tensors; nothing chooses them for CPU tensors by itself.

A kernel's fault breaks the CUDA context of its process and with it every later test; it is looked for after each test
marked `gpu`, and the process ends there, so that the test is named and, under pytest-xdist, a new process goes on.
"""

import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True
    del os.environ["TRITON_INTERPRET"]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """End the process when this test broke its CUDA context."""
    if item.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        words = f"the CUDA context broke in {item.nodeid}: {str(error).splitlines()[0]}"
        if not hasattr(item.config, "workerinput"):
            pytest.exit(words, returncode=3)
        print(words, file=sys.stderr, flush=True)
        os._exit(3)
