"""Rotary embedding of the runtime: frequencies from a spec's `Rope`, and the rotation of fused query and key heads."""

import math

import torch
from torch import Tensor

from shardwise.sharding.spec import Rope


class RotaryAngles:
    """Computes cos and sin for positions. `scale` multiplies both (the attention factor of YaRN and LongRoPE)."""

    def __init__(self, rope: Rope, *, max_positions: int, dtype: torch.dtype, device: torch.device):
        frequencies, self.scale = inverse_frequencies(rope, max_positions)
        self.frequencies = frequencies.to(device)
        self.dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, signed sin, each [T, 1, dim]: halves duplicated, sin negated in the first half."""
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos.to(self.dtype)[:, None], sin.to(self.dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX rotation of the leading `cos.shape[-1]` elements of each head, in place. x [T, N, D], any strides."""
    dim = cos.shape[-1]
    turned = x if dim == x.shape[-1] else x[..., :dim]
    swapped = torch.cat((turned[..., dim // 2 :], turned[..., : dim // 2]), -1)  # half of roll's host time on a GPU
    turned.mul_(cos).addcmul_(swapped, sin)
    return x


def inverse_frequencies(rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    """(float32 [dim / 2], factor on cos and sin). ValueError for a kind of scaling that is unknown."""
    if rope.interleaved:
        raise ValueError("rotary embedding of neighbouring pairs is not supported by this runtime")
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind not in _KINDS:
        raise ValueError(f"rope scaling {rope.kind!r} is not supported by the runtime; supported: {', '.join(_KINDS)}")
    return _KINDS[rope.kind](plain, rope, max_positions)


def _default(plain: Tensor, rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    return plain, 1.0


def _linear(plain: Tensor, rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    return plain / rope.parameters["factor"], 1.0


def _llama3(plain: Tensor, rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    p = rope.parameters
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / p["factor"] * (1 - keep), 1.0


def _yarn(plain: Tensor, rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv:2309.00071): a ramp over the dimensions between two numbers of turns."""
    p = rope.parameters
    original = p.get("original_max_position_embeddings") or max_positions
    factor = p.get("factor") or max_positions / original

    def dimension(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(p.get("beta_fast") or 32.0), dimension(p.get("beta_slow") or 1.0)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_attention_factor(p, factor)


def _yarn_attention_factor(p: dict, factor: float) -> float:
    def magnitude(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if p.get("attention_factor") is not None:
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(plain: Tensor, rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., arXiv:2402.13753) as far as the original context goes: a factor for each dimension."""
    p = rope.parameters
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or max_positions / original
    magnitude = p.get("attention_factor") or (1 + math.log(max(factor, 1.0)) / math.log(original)) ** 0.5
    return plain / torch.tensor(p["short_factor"], dtype=torch.float32), magnitude


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,  # which stretches only what is longer than the model's context
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
