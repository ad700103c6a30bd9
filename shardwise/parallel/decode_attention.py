"""The attention layers of the decode step: what each needs of its mixer, and its kernels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.ops.attention.decode import fused_decode_attention, gate_output, takes_head_size
from shardwise.ops.mla.decode import latent_decode_attention
from shardwise.ops.mla.decode import reason_against as reason_against_sizes
from shardwise.ops.normalization.decode import AllHeads
from shardwise.parallel.attention import AttentionMixer
from shardwise.parallel.decode_stream import Product, Stream, product
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.head_norms import HeadNorms, JointNorms
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
        return f"head sizes {size} and {mixer.v_head_dim}, need one multiple of 16 from 32 to 256"
    if mixer.gated and isinstance(mixer.qk_norms, JointNorms):
        return "all heads are normed at once, beside a gate of the output"
    if mixer.norm_after_rotation and isinstance(mixer.qk_norms, JointNorms):
        return "all heads are normed at once, after their rotation"
    return "" if Product.takes(mixer.qkv) and Product.takes(mixer.out) else "weights stay quantised"


def _reason_against_latents(mixer: LatentMixer) -> str:
    weights = mixer.weights
    linears = (mixer.down, mixer.out) if mixer.q_up is None else (mixer.down, mixer.q_up, mixer.out)
    if not all(map(Product.takes, linears)):
        return "weights stay quantised"
    return reason_against_sizes(weights.nope, weights.rank, mixer.key_width - weights.rank)


class Angles:
    """float32 [length, size]: cos of the pairs of a head's columns, then sin, of every position that a cache may hold;
    one a rotation. Pairs behind those that turn have an angle of zero."""

    def __init__(self, cache: DeviceCache):
        self._cache = cache
        self._found: dict[tuple[RotaryAngles, int], Tensor] = {}

    def of(self, rotary: RotaryAngles, size: int) -> Tensor:
        key = rotary, size
        if key not in self._found:
            device = self._cache.device
            places = torch.arange(self._cache.max_length, device=device, dtype=torch.float32)
            angles = places[:, None] * rotary.frequencies.to(device)
            still = size // 2 - angles.shape[1]
            cos, sin = F.pad(angles.cos() * rotary.scale, (0, still), value=1.0), angles.sin() * rotary.scale
            self._found[key] = torch.cat((cos, F.pad(sin, (0, still))), -1)
        return self._found[key]


@dataclass(frozen=True)
class AllHeadsStep:
    """`JointNorms` of a step's projections: one kernel, over several ranks two and the sum between them."""

    norms: AllHeads
    group: Communicator

    @classmethod
    def of(cls, norms: JointNorms) -> "AllHeadsStep":
        heads = len(norms.q), len(norms.k)
        weight = torch.cat((norms.q.flatten(), norms.k.flatten()))
        share = torch.cat((norms.q_share, norms.k_share))
        return cls(AllHeads(weight=weight, share=share, heads=heads, eps=norms.eps), norms.group)

    def __call__(self, qkv: Tensor, *, pdl: bool) -> None:
        """In place."""
        if self.group.size == 1:
            self.norms(qkv, pdl=pdl)
        else:
            means = self.norms.means(qkv, pdl=pdl)
            self.norms.apply(qkv, self.group.all_reduce(means, out=means), pdl=pdl)


@dataclass(frozen=True, kw_only=True)
class AttentionStep:
    """`step(stream, positions, slots)` -> attended [B, N * D]: the projection, norms of all heads where there are such,
    and one kernel for all else. `out` is to follow."""

    mixer: AttentionMixer
    cache: DeviceCache
    norms: HeadNorms | AllHeadsStep | None
    qkv: Product
    out: Product
    rope: Tensor | None
    pdl: bool

    def __call__(self, stream: Stream, positions: Tensor, slots: Tensor) -> Tensor:
        return self.attend(product(self.qkv, stream, pdl=self.pdl), positions, slots)

    def attend(self, qkv: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        mixer, cache = self.mixer, self.cache
        qkv, gates = qkv.tensor_split((mixer.qkv_width,), 1)
        norms = self.norms if isinstance(self.norms, HeadNorms) else None
        if isinstance(self.norms, AllHeadsStep):
            self.norms(qkv, pdl=self.pdl)
        attended = fused_decode_attention(
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
            softcap=mixer.masking.softcap or None,
            rotated=None if mixer.rotary is None else 2 * mixer.rotary.frequencies.numel(),
            q_norm=norms.q.weight if norms else None,
            k_norm=norms.k.weight if norms else None,
            eps=norms.q.eps if norms else 0.0,
            norm_last=mixer.norm_after_rotation,
            sinks=mixer.masking.sinks,
            window=mixer.masking.window,
            pdl=self.pdl,
        )
        if mixer.gated:
            gate_output(attended, gates, pdl=self.pdl)
        return attended


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
            rope=angles.of(mixer.rotary, 2 * mixer.rotary.frequencies.numel()),
            pdl=pdl,
        )
    assert isinstance(mixer, AttentionMixer)
    norms = mixer.qk_norms
    return AttentionStep(
        mixer=mixer,
        cache=cache,
        norms=AllHeadsStep.of(norms) if isinstance(norms, JointNorms) else norms,
        qkv=Product.of(mixer.qkv),
        out=Product.of(mixer.out),
        rope=None if mixer.rotary is None else angles.of(mixer.rotary, mixer.head_dim),
        pdl=pdl,
    )
