"""Collective operators on one rank, where every collective is the identity. More ranks: test_distributed_ops.py."""

import torch
from operator_samples import Sample


def _draw(device, *shape, dtype=torch.float32):
    return torch.randn(shape).to(device, dtype)


def _norm_oracle(tensor, residual, weight, eps, strategy):
    total = tensor.double() + residual.double()
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.double(), total


def _norm_arguments(dtype, strategy):
    def build(device):
        return (
            _draw(device, 3, 4, 48, dtype=dtype),
            _draw(device, 3, 4, 48, dtype=dtype),
            _draw(device, 48, dtype=dtype),
            1e-5,
            strategy,
        )

    return build


SAMPLES = [
    sample
    for backend in ("torch", "trtllm")
    for sample in (
        Sample(
            op=f"{backend}_dist_all_gather",
            build=lambda device: (_draw(device, 3, 4), 1),
            oracle=lambda tensor, dim: (tensor,),
            traced=True,
        ),
        Sample(
            op=f"{backend}_dist_all_gather",
            build=lambda device: (_draw(device, 3, 4, dtype=torch.bfloat16).t(), -1, [3]),
            oracle=lambda tensor, dim, sizes: (tensor,),
            note="sizes",
        ),
        Sample(
            op=f"{backend}_dist_all_reduce",
            build=lambda device: (_draw(device, 3, 4).t(), "AUTO"),
            oracle=lambda t, strategy: (t,),
            traced=True,
        ),
        Sample(
            op=f"{backend}_dist_all_reduce",
            build=lambda device: (torch.arange(5, device=device), "NCCL"),
            oracle=lambda t, strategy: (t,),
            note="int64",
        ),
    )
] + [
    Sample(
        op="dist::trtllm_fused_allreduce_residual_rmsnorm",
        build=_norm_arguments(torch.float32, "AUTO"),
        oracle=_norm_oracle,
        traced=True,
    ),
    Sample(
        op="dist::trtllm_fused_allreduce_residual_rmsnorm",
        build=_norm_arguments(torch.bfloat16, "NCCL"),
        oracle=_norm_oracle,
        atol=2e-2,
        note="bf16",
    ),
]
