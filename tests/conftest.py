"""Without a CUDA device, Triton kernels of this test process run in Triton's interpreter.

Triton decides when a kernel is decorated, so this must happen before anything imports triton. The environment
variable is taken back at once and Triton's own switch keeps the choice: processes that tests start see neither, and
behave as on a user's machine. Inside this process the only difference is that `triton_*` operators are available
for CPU tensors; nothing chooses them for CPU tensors by itself.
"""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True
    del os.environ["TRITON_INTERPRET"]
