"""Samples of the normalization operators."""

import torch
from operator_samples import Sample

EPS = 1e-5
HALF = torch.bfloat16


def rms(x, weight, eps):
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double(),)


def gated(x, weight, gate, eps, group_size, norm_before_gate=False):
    wide = x.double()
    silu = 1.0 if gate is None else gate.double() * gate.double().sigmoid()
    if not norm_before_gate:
        wide = wide * silu
    groups = wide.unflatten(-1, (-1, group_size))
    out = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight.double()
    return (out * silu if norm_before_gate else out,)


def fused_add(x, residual, weight, eps):
    total = (x.double() + residual.double()).to(x.dtype)
    return rms(x.double() + residual.double(), weight, eps)[0], total


def l2(x, eps=1e-6):
    wide = x.double()
    return (wide / (wide.square().sum(-1, keepdim=True) + eps).sqrt(),)


def norm_args(*shape, dtype=torch.float32, arrange=lambda x: x):
    def build(device):
        x = arrange(3 * torch.randn(*shape, device=device, dtype=dtype))
        return x, torch.rand(x.shape[-1], device=device, dtype=dtype) + 0.5, EPS

    return build


def gated_args(*shape, group, first, dtype=torch.float32, gate=True):
    def build(device):
        x, z = (torch.randn(*shape, device=device, dtype=dtype) for _ in range(2))
        return x, torch.rand(shape[-1], device=device, dtype=dtype) + 0.5, z if gate else None, EPS, group, first

    return build


def slice_of_projection(device):
    x = torch.randn(6, 96, device=device)
    return x[:, :48], torch.rand(48, device=device), x[:, 48:], EPS, 24, False


def slice_of_rows(x):
    """The same values as columns of a wider tensor, one element off its alignment."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 7), float("nan"))
    wide[..., 1 : x.shape[-1] + 1] = x
    return wide[..., 1 : x.shape[-1] + 1]


def add_args(*shape, dtype=HALF, arrange=lambda x: x):
    def build(device):
        x, residual = (arrange(torch.randn(*shape, device=device, dtype=dtype)) for _ in range(2))
        return x, residual, torch.rand(shape[-1], device=device, dtype=dtype) + 0.5, EPS

    return build


# One rounding of the result, and of the normed value before the weight in the reference.
BF16, FP16 = 2**-7, 2**-10
SAMPLES = [
    Sample(op="torch_rmsnorm", build=norm_args(2, 3, 64), oracle=rms, traced=True),
    Sample(op="torch_rmsnorm", build=norm_args(5, 576, dtype=HALF), oracle=rms, atol=2 * BF16, note="bf16"),
    Sample(op="torch_rmsnorm", build=norm_args(4, 6, 8, arrange=lambda x: x.transpose(0, 1)), oracle=rms, note="view"),
    Sample(op="torch_rmsnorm", build=norm_args(0, 16), oracle=rms, note="empty"),
    Sample(op="triton_rms_norm", build=norm_args(2, 3, 64), oracle=rms, traced=True),
    Sample(op="triton_rms_norm", build=norm_args(7, 2880, dtype=torch.float16), oracle=rms, atol=FP16, note="fp16"),
    Sample(op="triton_rms_norm", build=norm_args(3, 7168, dtype=HALF), oracle=rms, atol=BF16, note="bf16"),
    Sample(
        op="triton_rms_norm", build=norm_args(4, 6, 8, arrange=lambda x: x.transpose(0, 1)), oracle=rms, note="view"
    ),
    Sample(op="triton_rms_norm", build=norm_args(5, 64, arrange=lambda x: x[:, 8:40]), oracle=rms, note="slice"),
    Sample(op="triton_rms_norm", build=norm_args(2, 33, arrange=lambda x: x[:, 1:]), oracle=rms, note="misaligned"),
    Sample(op="triton_rms_norm", build=norm_args(0, 16), oracle=rms, note="empty"),
    Sample(op="flashinfer_rms_norm", build=norm_args(5, 3, 4096, dtype=HALF), oracle=rms, atol=BF16, traced=True),
    *(
        Sample(
            op=f"{backend}_fused_add_rms_norm_inplace",
            build=add_args(9, 2880),
            oracle=fused_add,
            atol=2 * BF16,
            traced=True,
        )
        for backend in ("torch", "triton", "flashinfer")
    ),
    Sample(
        op="triton_fused_add_rms_norm_inplace",
        build=add_args(2, 3, 33, dtype=torch.float32),
        oracle=fused_add,
        note="fp32",
    ),
    Sample(
        op="triton_fused_add_rms_norm_inplace",
        build=add_args(2, 3, 40, dtype=torch.float32, arrange=slice_of_rows),
        oracle=fused_add,
        note="slices",
    ),
    Sample(
        op="triton_fused_add_rms_norm_inplace",
        build=add_args(3, 7168, dtype=torch.float16),
        oracle=fused_add,
        atol=2 * FP16,
        note="fp16",
    ),
    Sample(op="torch_fused_add_rms_norm_inplace", build=add_args(0, 16), oracle=fused_add, note="empty"),
    Sample(op="triton_fused_add_rms_norm_inplace", build=add_args(0, 16), oracle=fused_add, note="empty"),
    *(
        Sample(op=op, build=gated_args(3, 5, 48, group=group, first=first), oracle=gated, note=f"{group}-{first}")
        for op in ("torch_rmsnorm_gated", "triton_rmsnorm_gated")
        for group, first in ((48, False), (16, False), (24, True))
    ),
    *(
        Sample(
            op=op, build=gated_args(2, 48, group=16, first=False, gate=False), oracle=gated, traced=True, note="plain"
        )
        for op in ("torch_rmsnorm_gated", "triton_rmsnorm_gated")
    ),
    Sample(op="triton_rmsnorm_gated", build=slice_of_projection, oracle=gated, note="slices"),
    Sample(
        op="triton_rmsnorm_gated",
        build=gated_args(5, 4096, group=512, first=False, dtype=HALF),
        oracle=gated,
        atol=BF16,
        note="bf16",
    ),
    Sample(
        op="sharded_rmsnorm",
        traced=True,
        build=lambda device: (*norm_args(4, 32)(device), 1),
        oracle=lambda x, w, e, _: rms(x, w, e),
    ),
    Sample(op="torch_l2norm", build=lambda device: (torch.randn(3, 4, 40, device=device),), oracle=l2, traced=True),
    Sample(
        op="fla_l2norm", build=lambda device: (torch.randn(0, 1, device=device, dtype=HALF),), oracle=l2, note="empty"
    ),
    Sample(
        op="fla_l2norm",
        build=lambda device: (torch.randn(3, 2, device=device, dtype=HALF)[:, ::2],),
        oracle=l2,
        atol=BF16,
        note="one column",
    ),
    Sample(
        op="fla_l2norm",
        build=lambda device: (torch.randn(3, 4, 128, device=device, dtype=HALF),),
        oracle=l2,
        atol=BF16,
        traced=True,
    ),
]
