"""The attention layers of the decode step: what each needs of its mixer, and its kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.decode import fused_decode_attention, takes_head_size
from shardwise.ops.mla.decode import latent_decode_attention
from shardwise.ops.mla.decode import reason_against as reason_against_sizes
from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.decode_stream import Product, Stream, product
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.head_norms import HeadNorms, JointNorms
from shardwise.parallel.layers import Linear
from shardwise.parallel.mla import LatentMixer
from shardwise.parallel.rotary import RotaryAngles


def reason_against(mixer: object) -> str:
    """Why a step cannot hold this mixer; empty when it can."""
    if isinstance(mixer, LatentMixer):
        return _reason_against_latents(mixer)
    if not isinstance(mixer, AttentionMixer):
        return "no softmax attention"
    size = mixer.head_dim
    if mixer.v_head_dim != size or not takes_head_size(size):
        return f"head sizes {size} and {mixer.v_head_dim}, need one power of two from 32 to 256"
    if mixer.masking.softcap is not None:
        return "capped scores"
    if mixer.gated:
        return "a gated output"
    if isinstance(mixer.qk_norms, JointNorms):
        return "all heads are normed at once"
    if mixer.norm_after_rotation:
        return "heads are normed after their rotation"
    if mixer.rotary is not None and 2 * mixer.rotary.frequencies.numel() != size:
        return "rotation of part of the head"
    return "" if isinstance(mixer.qkv, Linear) and isinstance(mixer.out, Linear) else "weights stay quantised"


def _reason_against_latents(mixer: LatentMixer) -> str:
    weights = mixer.weights
    linears = (mixer.down, mixer.out) if mixer.q_up is None else (mixer.down, mixer.q_up, mixer.out)
    if not all(isinstance(linear, Linear) for linear in linears):
        return "weights stay quantised"
    return reason_against_sizes(weights.nope, weights.rank, mixer.key_width - weights.rank)


class Angles:
    """float32 [length, D]: cos of the first half, then sin, of every position that a cache may hold; one a rotation."""

    def __init__(self, cache: DeviceCache):
        self._cache = cache
        self._found: dict[RotaryAngles, Tensor] = {}

    def of(self, rotary: RotaryAngles) -> Tensor:
        if rotary not in self._found:
            device = self._cache.device
            places = torch.arange(self._cache.max_length, device=device, dtype=torch.float32)
            angles = places[:, None] * rotary.frequencies.to(device)
            self._found[rotary] = torch.cat((angles.cos(), angles.sin()), -1) * rotary.scale
        return self._found[rotary]


@dataclass(frozen=True, kw_only=True)
class AttentionStep:
    """`step(stream, positions, slots)` -> attended [B, N * D]: the projection, and one kernel for all else. `out` is to
    follow."""

    mixer: AttentionMixer
    cache: DeviceCache
    norms: HeadNorms | None
    qkv: Product
    out: Product
    rope: Tensor | None
    pdl: bool

    def __call__(self, stream: Stream, positions: Tensor, slots: Tensor) -> Tensor:
        return self.attend(product(self.qkv, stream, pdl=self.pdl), positions, slots)

    def attend(self, qkv: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        mixer, norms, cache = self.mixer, self.norms, self.cache
        return fused_decode_attention(
            qkv,
            *cache.pages(mixer.layer),
            cache.table(mixer.layer),
            positions,
            self.rope,
            cache.workspace(mixer.heads, mixer.kv_heads, mixer.head_dim),
            heads=mixer.heads,
            slots=slots,
            splits=cache.splits(mixer.kv_heads, mixer.masking.window, qkv.shape[0]),
            scale=mixer.masking.scale,
            q_norm=norms.q.weight if norms else None,
            k_norm=norms.k.weight if norms else None,
            eps=norms.q.eps if norms else 0.0,
            sinks=mixer.masking.sinks,
            window=mixer.masking.window,
            pdl=self.pdl,
        )


@dataclass(frozen=True, kw_only=True)
class LatentStep:
    """As `AttentionStep`, with attention to latents: [B, N * Dv]."""

    mixer: LatentMixer
    cache: DeviceCache
    down: Product
    q_up: Product | None
    out: Product
    rope: Tensor
    pdl: bool

    def __call__(self, stream: Stream, positions: Tensor, slots: Tensor) -> Tensor:
        q, key = self.mixer.split(product(self.down, stream, pdl=self.pdl))
        if self.q_up is not None:
            q = product(self.q_up, Stream(q, q, self.mixer.q_norm), pdl=self.pdl)
        return self.attend(q, key, positions, slots)

    def attend(self, q: Tensor, key: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        mixer, cache, weights = self.mixer, self.cache, self.mixer.weights
        return latent_decode_attention(
            q,
            key,
            weights.key_up,
            weights.value_up,
            cache.latents(mixer.layer),
            cache.table(mixer.layer),
            slots,
            positions,
            cache.latent_workspace(weights),
            scale=mixer.masking.scale,
            norm=mixer.kv_norm.weight,
            eps=mixer.kv_norm.eps,
            rope=self.rope,
            pdl=self.pdl,
        )


def attention_step(mixer: object, cache: DeviceCache, angles: Angles, *, pdl: bool) -> AttentionStep | LatentStep:
    """For a mixer that `reason_against` has nothing against."""
    if isinstance(mixer, LatentMixer):
        return LatentStep(
            mixer=mixer,
            cache=cache,
            down=Product.of(mixer.down),
            q_up=None if mixer.q_up is None else Product.of(mixer.q_up),
            out=Product.of(mixer.out),
            rope=angles.of(mixer.rotary),
            pdl=pdl,
        )
    assert isinstance(mixer, AttentionMixer) and not isinstance(mixer.qk_norms, JointNorms)
    return AttentionStep(
        mixer=mixer,
        cache=cache,
        norms=mixer.qk_norms,
        qkv=Product.of(mixer.qkv),
        out=Product.of(mixer.out),
        rope=None if mixer.rotary is None else angles.of(mixer.rotary),
        pdl=pdl,
    )
