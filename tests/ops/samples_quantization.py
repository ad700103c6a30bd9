"""Samples of the quantisation operators."""

import torch
from operator_samples import Sample

from shardwise.ops.quantization import fp8, int4, nvfp4

M, N, K = 3, 24, 64


def on(device, *shape):
    return torch.randn(*shape, device=device)


def rounded(x, scale):
    """Through e4m3, saturating."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def linear(x, weight, bias):
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double(),)


def fp8_args(shape, outputs, bias):
    def build(device):
        weight, scale = fp8.quantize_fp8(on(device, outputs, shape[-1]) * shape[-1] ** -0.5)
        return (
            on(device, *shape),
            weight,
            on(device, outputs) if bias else None,
            torch.tensor(4 / 448, device=device),
            scale,
        )

    return build


def fp8_oracle(x, weight, bias, s_in, s_weight):
    return linear(rounded(x, s_in), weight.double() * s_weight.double(), bias)


def fp8_fake_args(device):
    x, weight, bias, s_in, s_weight = fp8_args((2, M, K), N, True)(device)
    return x, weight, bias, [s_in], [s_weight], [], []


def bmm_args(quantised):
    def build(device):
        left, right = on(device, 2, M, 16), on(device, 2, 32, 16).transpose(1, 2)
        scale = torch.tensor(4 / 448, device=device)
        if quantised:
            left, right = (fp8.quantize_fp8(t, scale)[0] for t in (left, right.contiguous()))
        return left, right, scale, scale

    return build


def bmm_oracle(left, right, s_in, s_weight):
    def values(tensor, scale):
        return tensor.double() * scale.double() if tensor.dtype == torch.float8_e4m3fn else rounded(tensor, scale)

    return (values(left, s_in) @ values(right, s_weight),)


def nvfp4_args(device):
    x, weight = on(device, 2, M, K), on(device, N, K) * K**-0.5
    g_in, g_weight = nvfp4.nvfp4_global_scale(x), nvfp4.nvfp4_global_scale(weight)
    codes, scales = nvfp4.quantize_nvfp4(weight, g_weight)
    return x, codes, on(device, N), g_in, nvfp4.swizzle_scales(scales), 1 / (g_in * g_weight)


def nvfp4_oracle(x, codes, bias, g_in, swizzled, alpha):
    plain = nvfp4.unswizzle_scales(swizzled, N, K // 16)
    weight = nvfp4.dequantize_nvfp4(codes, plain).double() * (alpha.double() * g_in.double())
    return linear(nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(x, g_in), g_in), weight, bias)


def nvfp4_fake_args(device):
    x, codes, bias, g_in, swizzled, alpha = nvfp4_args(device)
    return x, codes, bias, [g_in], [swizzled, alpha], [], []


def awq_args(device):
    packed, scales = int4.quantize_int4_awq(on(device, N, 256))
    return on(device, 2, M, 256), packed, None, [torch.rand(256, device=device) + 0.5], [scales], [], []


def awq_oracle(x, packed, bias, pre, scales, _zp, _wzp):
    rows = []
    for byte_row in packed.tolist():
        rows += [[(b & 15) - 16 * ((b & 15) > 7) for b in byte_row], [(b >> 4) - 16 * (b > 127) for b in byte_row]]
    codes = torch.tensor(rows, dtype=torch.float64, device=x.device)
    return linear(x.double() * pre[0].double(), codes * scales[0].double().repeat_interleave(128, 1), bias)


def gptq_args(device):
    qweight, scales, qzeros = int4.quantize_int4_gptq(on(device, K, N), 32)
    return on(device, M, K), qweight, on(device, N), [], [scales], [], [qzeros]


def gptq_oracle(x, qweight, bias, _in, scales, _zp, zeros):
    weight = torch.empty(K, N, dtype=torch.float64, device=x.device)
    for k in range(K):
        for n in range(N):
            code = (int(qweight[k // 8, n]) >> (4 * (k % 8))) & 15
            zero = (int(zeros[0][k // 32, n // 8]) >> (4 * (n % 8))) & 15
            weight[k, n] = scales[0][k // 32, n].double() * (code - zero)
    return linear(x, weight.T, bias)


def int8(x, scale):
    codes = (x.double() / scale.double()).round().clamp(-128, 127)
    return (codes * scale.double(),)


def plain_cast(x, weight, bias, s_in, s_weight, _zp, _wzp):
    values = (x / s_in[0]).to(torch.float8_e4m3fn).double() * s_in[0].double()
    return linear(values, weight.double() * s_weight[0].double(), bias)


def nvfp4_plain(x, codes, bias, g_in, scales, _zp, _wzp):
    return nvfp4_oracle(x, codes, bias, g_in[0], *scales)


# Half a step of a code where float32 and float64 scale to different sides of a midpoint, times a weight.
EDGE = 2e-3
BF16 = 2**-7
SAMPLES = [
    Sample(
        op="torch_quant_fn",
        build=lambda device: (40 * on(device, 3, 40), torch.tensor(0.5, device=device)),  # exact: no other side of ties
        oracle=int8,
        atol=0,
        traced=True,
    ),
    Sample(op="torch_quant_fp8_linear", build=fp8_args((2, M, K), N, True), oracle=fp8_oracle, atol=EDGE, traced=True),
    Sample(op="torch_quant_fp8_linear", build=fp8_args((5, 24), 10, False), oracle=fp8_oracle, atol=EDGE, note="pad"),
    Sample(op="torch_quant_fp8_linear", build=fp8_args((0, K), N, True), oracle=fp8_oracle, note="empty"),
    Sample(op="trtllm_quant_fp8_linear", build=fp8_args((2, M, K), N, True), oracle=fp8_oracle, atol=EDGE, traced=True),
    Sample(
        op="trtllm_quant_fp8_linear", build=fp8_args((40, 96), 40, False), oracle=fp8_oracle, atol=EDGE, note="many"
    ),
    Sample(op="torch_quant_fp8_bmm", build=bmm_args(False), oracle=bmm_oracle, atol=EDGE, traced=True),
    Sample(op="torch_quant_fp8_bmm", build=bmm_args(True), oracle=bmm_oracle, atol=BF16, note="codes"),
    Sample(op="torch_quant_nvfp4_linear", build=nvfp4_args, oracle=nvfp4_oracle, atol=1e-4, traced=True),
    Sample(op="torch_fake_quant_fp8_linear", build=fp8_fake_args, oracle=plain_cast, atol=EDGE, traced=True),
    Sample(op="torch_fake_quant_nvfp4_linear", build=nvfp4_fake_args, oracle=nvfp4_plain, atol=1e-4, traced=True),
    Sample(op="torch_fake_quant_int4_linear", build=awq_args, oracle=awq_oracle, atol=1e-4, traced=True),
    Sample(op="torch_fake_quant_int4_gptq_linear", build=gptq_args, oracle=gptq_oracle, atol=1e-4, traced=True),
]
