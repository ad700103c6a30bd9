"""The attention mixer: fused projection, norms of queries and keys, rotation, cached attention, its gate, output
projection."""

import torch
from torch import Tensor

from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache, Masking
from shardwise.parallel.head_norms import HeadNorms, JointNorms
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.rotary import RotaryAngles, rotate


class AttentionMixer:
    """Attention of this rank's heads: `heads` query heads that share `kv_heads` KV heads evenly.

    The projection's rows are [queries | keys | values], and with `gated` the gates, whose sigmoid is a factor of each
    element of what is attended. Returns this rank's partial sum.
    """

    def __init__(
        self,
        *,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        qkv: LinearLike,
        out: LinearLike,
        masking: Masking,
        rotary: RotaryAngles | None = None,
        qk_norms: HeadNorms | JointNorms | None = None,
        norm_after_rotation: bool = False,
        gated: bool = False,
    ):
        self.layer, self.heads, self.kv_heads = layer, heads, kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.qkv, self.out, self.masking = qkv, out, masking
        self.rotary, self.qk_norms = rotary, qk_norms
        self.norm_after_rotation, self.gated = norm_after_rotation, gated
        self._queries_end, self._keys_end = heads * head_dim, (heads + kv_heads) * head_dim
        self._kv_width = kv_heads * (head_dim + v_head_dim)
        self.qkv_width = self._queries_end + self._kv_width
        """Of the projection's rows, without the gates."""

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        tokens = x.shape[0]
        if tokens == 0:  # the other groups of data-parallel attention have tokens in this step
            return torch.zeros_like(x)
        qkv = self.qkv(x)
        qk = qkv.narrow(1, 0, self._keys_end).view(tokens, -1, self.head_dim)
        if not self.norm_after_rotation:
            self._norm(qk)
        if self.rotary is not None:
            rotate(qk, *batch.rotation(self.rotary))
        if self.norm_after_rotation:
            self._norm(qk)
        kv = qkv.narrow(1, self._queries_end, self._kv_width)
        attended = cache.attend(self.layer, qk.narrow(1, 0, self.heads), kv, batch, self.masking).reshape(tokens, -1)
        if self.gated:
            attended = attended * qkv[:, self.qkv_width :].sigmoid()
        return self.out(attended)

    def _norm(self, qk: Tensor) -> None:
        if self.qk_norms is not None:
            self.qk_norms(*qk.split_with_sizes((self.heads, self.kv_heads), 1))
