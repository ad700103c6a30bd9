"""Bit-exact conversions of the small float formats: e2m1, e8m0 and e4m3.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3 and 5.4, and OCP 8-bit Floating Point
Specification v1.0. Rounding is to nearest, ties to the even code; values beyond the largest finite code saturate.
"""

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_BIAS = 127
E8M0_NAN = 255


def e2m1_decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of 4-bit codes (uint8, bit 3 the sign, upper nibble ignored); same shape, exact in every float dtype."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=dtype, device=codes.device)
    return table[(codes & 0xF).long()]


def e2m1_encode(values: Tensor) -> Tensor:
    """Codes (uint8, 0..15) nearest to `values` (any float dtype); NaN, which e2m1 lacks, becomes a signed zero."""
    magnitude = values.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    # The midpoint between codes c and c + 1 belongs to the even one: up from an odd c, down from an even one.
    for lower in range(7):
        midpoint = (E2M1_VALUES[lower] + E2M1_VALUES[lower + 1]) / 2
        code += (magnitude >= midpoint) if lower % 2 else (magnitude > midpoint)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def e2m1_round(values: Tensor) -> Tensor:
    """Values that the codes of `e2m1_encode` stand for, same shape and dtype; NaN becomes zero."""
    magnitude = values.abs().clamp_(1, E2M1_MAX)
    step = magnitude / torch.frexp(magnitude).mantissa / 4  # 1/2 up to 2, 1 up to 4, 2 up to 6
    return (values / step).round_().mul_(step).nan_to_num_(0.0).clamp_(-E2M1_MAX, E2M1_MAX)


def e2m1_pack(codes: Tensor) -> Tensor:
    """Codes [..., K] to bytes [..., K/2], the even index in the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"e2m1_pack: the last dimension must be even, got {tuple(codes.shape)}")
    return (codes[..., 0::2] & 0xF) | (codes[..., 1::2] << 4)


def e2m1_unpack(packed: Tensor) -> Tensor:
    """Bytes [..., K/2] to codes [..., K], the low nibble first."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def e8m0_decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2 ** (code - 127) of uint8 codes, NaN for 255. float32, float64 and bfloat16 hold every value exactly."""
    one = torch.ones(codes.shape, dtype=torch.float64, device=codes.device)
    values = torch.ldexp(one, codes.to(torch.int32) - E8M0_BIAS)
    return values.masked_fill(codes == E8M0_NAN, torch.nan).to(dtype)


def e8m0_encode(values: Tensor) -> Tensor:
    """Codes of the largest powers of two not above `values` (>= 0); 0 gives code 0, NaN and infinity give 255."""
    _, exponent = torch.frexp(values.double())
    code = (exponent - 1 + E8M0_BIAS).clamp(0, 254).to(torch.uint8)
    code = code.masked_fill(values == 0, 0)
    return code.masked_fill(~torch.isfinite(values), E8M0_NAN)


def e4m3_encode(values: Tensor) -> Tensor:
    """float8_e4m3fn nearest to `values`, saturating at 448 (a plain cast may give NaN there); NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
