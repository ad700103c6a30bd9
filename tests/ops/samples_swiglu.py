"""Samples of the SwiGLU MLPs; oracles decode quantised weights, and quantise activations where the operator does."""

import torch
from operator_samples import Sample

from shardwise.ops.quantization import fp8, nvfp4

H, I = 32, 48


def weights(device, rows=I, columns=H, dtype=torch.float32):
    """gate, up [rows, columns], down [columns, rows]."""
    shapes = ((rows, columns), (rows, columns), (columns, rows))
    return [(torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype) for shape in shapes]


def mlp(x, gate, up, down, gate_bias=None, up_bias=None, down_bias=None):
    def linear(x, weight, bias):
        return x @ weight.double().T + (0 if bias is None else bias.double())

    g = linear(x.double(), gate, gate_bias)
    return (linear(g * g.sigmoid() * linear(x.double(), up, up_bias), down, down_bias),)


def plain_args(bias=True, dtype=torch.float32, shape=(2, 3, H)):
    def build(device):
        biases = [torch.randn(n, device=device, dtype=dtype) if bias else None for n in (I, I, H)]
        return torch.randn(*shape, device=device, dtype=dtype), *weights(device, dtype=dtype), *biases

    return build


def fused_args(device):
    x, gate, up, down, gate_bias, up_bias, down_bias = plain_args()(device)
    return x, torch.cat((gate, up)), down, torch.cat((gate_bias, up_bias)), down_bias


def fused(x, gate_up, down, gate_up_bias, down_bias):
    return mlp(x, *gate_up.chunk(2), down, *gate_up_bias.chunk(2), down_bias)


def block_args(device):
    quantised = [fp8.quantize_fp8_blocks(weight) for weight in weights(device, 256, 160)]
    codes, scales = zip(*quantised, strict=True)
    return torch.randn(3, 160, device=device), *codes, *scales


def block(x, *rest):
    codes, scales = rest[:3], rest[3:]
    return mlp(x, *(fp8.dequantize_fp8_blocks(c, s, dtype=torch.float32) for c, s in zip(codes, scales, strict=True)))


def fused_block_args(device):
    x, gate, up, down, gate_scale, up_scale, down_scale = block_args(device)
    joined = torch.cat((gate.view(torch.uint8), up.view(torch.uint8))).view(torch.float8_e4m3fn)
    return x, joined, down, torch.cat((gate_scale, up_scale)), down_scale


def fused_block(x, gate_up, down, gate_up_scale, down_scale):
    gate_up = fp8.dequantize_fp8_blocks(gate_up, gate_up_scale, dtype=torch.float32)
    return mlp(x, *gate_up.chunk(2), fp8.dequantize_fp8_blocks(down, down_scale, dtype=torch.float32))


def packed(weight, input_scale):
    """(codes, swizzled scales, alpha) of one NVFP4 linear."""
    scale = nvfp4.nvfp4_global_scale(weight)
    codes, scales = nvfp4.quantize_nvfp4(weight, scale)
    return codes, nvfp4.swizzle_scales(scales), 1 / (input_scale * scale)


def nvfp4_args(device):
    x, (gate, up, down) = torch.randn(5, H, device=device), weights(device)
    scales = [nvfp4.nvfp4_global_scale(x), nvfp4.nvfp4_global_scale(x), torch.tensor(500.0, device=device)]
    parts = [packed(weight, scale) for weight, scale in zip((gate, up, down), scales, strict=True)]
    triples = [(scale, part[1], part[2]) for scale, part in zip(scales, parts, strict=True)]
    return x, *(part[0] for part in parts), *(value for triple in triples for value in triple)


def four_bit(x, codes, swizzled, scale, alpha):
    """One NVFP4 linear in float64; the activations pass through the format."""
    columns = x.shape[-1]
    weight = nvfp4.dequantize_nvfp4(codes, nvfp4.unswizzle_scales(swizzled, codes.shape[0], columns // 16)).double()
    values = nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(x, scale)).double()
    return values @ weight.T * alpha.double()


def activated(gate, up):
    """As the operator: in the input's dtype, because the next linear quantises these values."""
    return torch.nn.functional.silu(gate.float()) * up.float()


def nvfp4_mlp(x, gate, up, down, *rest):
    (gs, gw, ga), (us, uw, ua), (ds, dw, da) = rest[:3], rest[3:6], rest[6:]
    hidden = activated(four_bit(x, gate, gw, gs, ga), four_bit(x, up, uw, us, ua))
    return (four_bit(hidden, down, dw, ds, da),)


def fused_nvfp4_args(device):
    x, (gate, up, down) = torch.randn(5, H, device=device), weights(device)
    scales = nvfp4.nvfp4_global_scale(x), torch.tensor(500.0, device=device)
    both, last = packed(torch.cat((gate, up)), scales[0]), packed(down, scales[1])
    return x, both[0], last[0], scales[0], *both[1:], scales[1], *last[1:]


def fused_nvfp4(x, gate_up, down, scale, swizzled, alpha, down_scale, down_swizzled, down_alpha):
    hidden = activated(*four_bit(x, gate_up, swizzled, scale, alpha).chunk(2, -1))
    return (four_bit(hidden, down, down_swizzled, down_scale, down_alpha),)


# A value on the border of two 4-bit codes may fall to either side in float32 and float64.
FOUR_BIT = 0.05
SAMPLES = [
    *(
        Sample(op=op, build=plain_args(), oracle=mlp, atol=1e-4, traced=True)
        for op in ("torch_swiglu_mlp", "triton_swiglu_mlp")
    ),
    *(
        Sample(op=op, build=plain_args(False, torch.float16, (4, H)), oracle=mlp, atol=5e-3, note="fp16")
        for op in ("torch_swiglu_mlp", "triton_swiglu_mlp")
    ),
    Sample(op="triton_swiglu_mlp", build=plain_args(shape=(0, H)), oracle=mlp, note="empty"),
    Sample(op="fused_swiglu_mlp", build=fused_args, oracle=fused, atol=1e-4, traced=True),
    Sample(op="torch_finegrained_fp8_swiglu_mlp", build=block_args, oracle=block, atol=1e-4, traced=True),
    Sample(op="fused_finegrained_fp8_swiglu_mlp", build=fused_block_args, oracle=fused_block, atol=1e-4, traced=True),
    Sample(op="torch_nvfp4_swiglu_mlp", build=nvfp4_args, oracle=nvfp4_mlp, atol=FOUR_BIT, traced=True),
    Sample(op="fused_nvfp4_swiglu_mlp", build=fused_nvfp4_args, oracle=fused_nvfp4, atol=FOUR_BIT, traced=True),
]
