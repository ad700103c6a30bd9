"""The latent attention mixer: queries meet keys and values in the latent space, which is all that is cached.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1, with the projections from the latent absorbed: W_UK into the
queries, W_UV behind the attended latents. So all heads share one key, [latent | rotated part], and its latent is the
value.
"""

import torch
from torch import Tensor

from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache, Masking
from shardwise.parallel.layers import LinearLike, Norm
from shardwise.parallel.rotary import RotaryAngles, rotate


class LowRank:
    """x [T, H] -> up(norm(down x))."""

    def __init__(self, *, down: LinearLike, norm: Norm, up: LinearLike):
        self.down, self.norm, self.up = down, norm, up

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x)))


class LatentMixer:
    """Latent attention of this rank's N heads; the latent is every rank's. Returns this rank's partial sum.

    q         x [T, H] -> queries [T, N * (P + R)], each its part without rotation and its rotated one
    kv        x -> [T, C + R]: the latent, before `kv_norm`, and the keys' rotated part
    key_up    W_UK [N, P, C]
    value_up  W_UV, turned, [N, C, Dv]
    """

    def __init__(
        self,
        *,
        layer: int,
        q: LinearLike | LowRank,
        kv: LinearLike,
        kv_norm: Norm,
        key_up: Tensor,
        value_up: Tensor,
        out: LinearLike,
        masking: Masking,
        rotary: RotaryAngles,
    ):
        self.layer, self.q, self.kv, self.kv_norm = layer, q, kv, kv_norm
        self.key_up, self.value_up, self.out = key_up, value_up, out
        self.masking, self.rotary = masking, rotary

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        tokens, (heads, plain, latent) = x.shape[0], self.key_up.shape
        if tokens == 0:  # the other groups of data-parallel attention have tokens in this step
            return torch.zeros_like(x)
        angles = batch.rotation(self.rotary)
        key = self.kv(x)
        key[:, :latent] = self.kv_norm(key[:, :latent])
        rotate(key[:, None, latent:], *angles)
        q = self.q(x).view(tokens, heads, -1)
        query = q.new_empty(tokens, heads, key.shape[1])
        query[..., :latent] = torch.bmm(q[..., :plain].transpose(0, 1), self.key_up).transpose(0, 1)
        query[..., latent:] = rotate(q[..., plain:], *angles)
        attended = cache.attend(self.layer, query, key, batch, self.masking)
        values = torch.bmm(attended.transpose(0, 1), self.value_up)  # [N, T, Dv]
        return self.out(values.transpose(0, 1).reshape(tokens, -1))
