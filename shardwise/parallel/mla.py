"""The latent attention mixer: queries meet keys and values in the latent space, which is all that is cached.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1. All heads share one cached key, [latent | rotated part], from which
each head's keys and values follow by its part of `LatentWeights`.
"""

import torch
from torch import Tensor

from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache, LatentWeights, Masking
from shardwise.parallel.layers import LinearLike, Norm
from shardwise.parallel.rotary import RotaryAngles, rotate


class LatentMixer:
    """Latent attention of this rank's N heads; the latent is every rank's. Returns this rank's partial sum.

    down     x [T, H] -> [queries | latent, before `kv_norm`, C | the keys' rotated part R]
    q_norm   with `q_up`: what stands for the queries there is their own latent, normed and then multiplied by `q_up`
    weights  of keys and values

    Queries are [T, N * (P + R)], each its part without rotation and its rotated one.
    """

    def __init__(
        self,
        *,
        layer: int,
        down: LinearLike,
        q_norm: Norm | None,
        q_up: LinearLike | None,
        kv_norm: Norm,
        weights: LatentWeights,
        out: LinearLike,
        masking: Masking,
        rotary: RotaryAngles,
    ):
        self.layer, self.down, self.q_norm, self.q_up = layer, down, q_norm, q_up
        self.kv_norm, self.weights, self.out = kv_norm, weights, out
        self.masking, self.rotary = masking, rotary
        self.key_width = weights.rank + 2 * rotary.frequencies.numel()

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        if x.shape[0] == 0:  # the other groups of data-parallel attention have tokens in this step
            return torch.zeros_like(x)
        angles, weights = batch.rotation(self.rotary), self.weights
        q, key = self.split(self.down(x))
        if self.q_up is not None and self.q_norm is not None:
            q = self.q_up(self.q_norm(q))
        q = q.unflatten(1, (weights.heads, -1))
        rotate(q[..., weights.nope :], *angles)
        latent = key[:, : weights.rank]
        latent.copy_(self.kv_norm(latent))
        rotate(key[:, None, weights.rank :], *angles)
        values = cache.attend_latents(self.layer, q, key, batch, weights, self.masking)
        return self.out(values.flatten(1))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What `down` gives as queries, or their latent, and keys [T, C + R]; views."""
        queries = rows.shape[1] - self.key_width
        return rows[:, :queries], rows[:, queries:]
