"""Mixtures of experts in float64 from the formulas, over dense or dequantised weights, and small random layers."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from shardwise.ops.quantization import fp8, mxfp4, nvfp4
from shardwise.partition import extent

ALPHA, LIMIT = 1.702, 7.0


@dataclass(frozen=True)
class GptOssLayer:
    """Router and MXFP4 experts as a gpt-oss checkpoint stores them."""

    router: Tensor
    router_bias: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_bias: Tensor
    down_scales: Tensor

    def arguments(self, top_k: int) -> tuple:
        """What follows hidden_states in the operators' argument lists, without the expert-parallel tail."""
        return (
            *(self.router, self.router_bias, top_k, self.gate_up, self.gate_up_bias, self.gate_up_scales, ALPHA, LIMIT),
            *(self.down, self.down_bias, self.down_scales),
        )

    def shard(self, size: int, rank: int) -> "GptOssLayer":
        """The experts of one expert-parallel rank; the router stays whole."""
        part = slice(*extent(self.router.shape[0], size, rank))
        names = [field.name for field in fields(self) if not field.name.startswith("router")]
        return replace(self, **{name: getattr(self, name)[part].contiguous() for name in names})

    def experts64(self, expert: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2I, H], down [H, I]) of one expert in float64."""
        first = mxfp4.dequantize_mxfp4(self.gate_up[expert], self.gate_up_scales[expert], torch.float64)
        return first, mxfp4.dequantize_mxfp4(self.down[expert], self.down_scales[expert], torch.float64)


def gpt_oss_layer(experts: int, hidden: int, size: int, device="cpu", dtype=torch.float32) -> GptOssLayer:
    """A random layer; weights are scaled so that activations stay near one."""

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, device=device) * scale

    gate_up, gate_up_scales = mxfp4.quantize_mxfp4(randn(experts, 2 * size, hidden, scale=hidden**-0.5))
    down, down_scales = mxfp4.quantize_mxfp4(randn(experts, hidden, size, scale=size**-0.5))
    return GptOssLayer(
        router=randn(experts, hidden, scale=2 * hidden**-0.5).to(dtype),
        router_bias=randn(experts).to(dtype),
        gate_up=gate_up,
        gate_up_bias=randn(experts, 2 * size).to(dtype),
        gate_up_scales=gate_up_scales,
        down=down,
        down_bias=randn(experts, hidden).to(dtype),
        down_scales=down_scales,
    )


def gpt_oss_oracle(x: Tensor, layer: GptOssLayer, top_k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The whole layer; routing, biases and sums in float64, matrix products in `dtype` with exact weights."""
    logits = x.double() @ layer.router.double().T + layer.router_bias.double()
    values, ids = logits.topk(top_k, dim=-1)
    weights = values.softmax(-1)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        first, second = (weight.to(dtype) for weight in layer.experts64(expert))
        z = (x[token].to(dtype) @ first.T).double() + layer.gate_up_bias[expert].double()
        gate, up = z[:, 0::2].clamp(max=LIMIT), z[:, 1::2].clamp(-LIMIT, LIMIT)
        hidden = ((up + 1) * gate * torch.sigmoid(ALPHA * gate)).to(dtype)
        y = (hidden @ second.T).double() + layer.down_bias[expert].double()
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


def routed_oracle(x, ids, weights, first, second, gated=True, on_input=False, first_step=None, second_step=None):
    """Float64 sum over stacked experts, first [E, 2I, H] (up, gate) or [E, I, H] with relu squared, second [E, H, I].

    first_step, second_step   rounding of x and of the activation, for quantised operators
    """
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert, weight = int(ids[token, slot]), weights[token, slot].double()
            if not 0 <= expert < first.shape[0]:
                continue
            row = x[token].double() * (weight if on_input else 1.0)
            row = row if first_step is None else first_step(row)
            z = first[expert].double() @ row
            if gated:
                up, gate = z.chunk(2)
                hidden = up * gate * torch.sigmoid(gate)
            else:
                hidden = z.clamp(min=0).square()
            hidden = hidden if second_step is None else second_step(hidden)
            out[token] += second[expert].double() @ hidden * (1.0 if on_input else weight)
    return out


def stacked(experts: int, hidden: int, size: int, gated: bool, device="cpu", dtype=torch.float32):
    """Random (first, second) of `routed_oracle`."""
    rows = size * (2 if gated else 1)
    first = torch.randn(experts, rows, hidden, device=device) * hidden**-0.5
    return first.to(dtype), (torch.randn(experts, hidden, size, device=device) * size**-0.5).to(dtype)


def routing(tokens: int, top_k: int, experts: int, device="cpu"):
    """(ids, weights); ids reach one past both ends of the local range, and may repeat in a token."""
    ids = torch.randint(-1, experts + 1, (tokens, top_k), device=device)
    return ids, torch.rand(tokens, top_k, device=device)


def fp8_stack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes e4m3, scales [E], float64 values) of a stack, one scale an expert."""
    pairs = [fp8.quantize_fp8(expert) for expert in weight]
    codes = torch.stack([code.view(torch.uint8) for code, _ in pairs]).view(torch.float8_e4m3fn)
    scales = torch.stack([scale for _, scale in pairs])
    return codes, scales, codes.double() * scales.double()[:, None, None]


def fp8_block_stack(weight: Tensor, halves: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes e4m3, scales [E, N/128, K/128], float64 values) of a stack; blocks do not cross `halves` of the rows."""
    codes, scales, values = [], [], []
    for expert in weight:
        pairs = [fp8.quantize_fp8_blocks(part) for part in expert.chunk(halves)]
        codes.append(torch.cat([code.view(torch.uint8) for code, _ in pairs]))
        scales.append(torch.cat([scale for _, scale in pairs]))
        values.append(torch.cat([fp8.dequantize_fp8_blocks(*pair, dtype=torch.float64) for pair in pairs]))
    return torch.stack(codes).view(torch.float8_e4m3fn), torch.stack(scales), torch.stack(values)


def nvfp4_stack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, swizzled scales [E, rows, columns], global scales [E], float64 values) of a stack."""
    globals_ = torch.stack([nvfp4.nvfp4_global_scale(expert) for expert in weight])
    pairs = [nvfp4.quantize_nvfp4(expert, scale) for expert, scale in zip(weight, globals_, strict=True)]
    values = [nvfp4.dequantize_nvfp4(*pair).double() / g.double() for pair, g in zip(pairs, globals_, strict=True)]
    columns = -(-weight.shape[2] // 64) * 4
    scales = torch.stack([nvfp4.swizzle_scales(scale).view(-1, columns) for _, scale in pairs])
    return torch.stack([codes for codes, _ in pairs]), scales, globals_, torch.stack(values)


def e4m3_step(scale: Tensor):
    """Round float64 values through e4m3 with a scale."""
    return lambda values: (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def relative(result: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN never passes a comparison."""
    return ((result.double() - wanted.double()).norm() / wanted.double().norm()).item()


def float8_stack(experts: int, rows: int, columns: int, tiled: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of tiles or channels, and values, of e4m3 experts."""
    codes = torch.randint(0, 120, (experts, rows, columns), dtype=torch.uint8)
    codes = (codes | torch.randint(0, 2, codes.shape, dtype=torch.uint8) << 7).view(torch.float8_e4m3fn)
    shape = (experts, -(-rows // 128), -(-columns // 128)) if tiled else (experts, rows)
    scales = (0.5 + torch.rand(shape)) * columns**-0.5 / 60
    spread = scales[:, :, None]
    if tiled:
        spread = scales.repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)[:, :, :columns]
    return codes.to(device), scales.to(device), (codes.float() * spread).to(device)
