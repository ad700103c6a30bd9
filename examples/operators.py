"""One operator, two backends, the same answer; and what an operator says that cannot run here.

python examples/operators.py
"""

import torch

import shardwise.ops as ops

x, weight = torch.randn(4, 64), torch.ones(64)
print(torch.ops.auto_deploy.torch_rmsnorm(x, weight, 1e-6).norm(dim=-1))
try:
    print(torch.ops.auto_deploy.triton_rms_norm(x, weight, 1e-6).norm(dim=-1))
except ops.OperatorUnavailable as reason:
    print(reason)
