"""Norms of queries and keys, between projection and cache."""

import torch
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.parallel.layers import Norm


class HeadNorms:
    """Each head by itself."""

    def __init__(self, *, q: Norm, k: Norm):
        self.q, self.k = q, k

    def __call__(self, q: Tensor, k: Tensor) -> None:
        """q [T, N, D] and k [T, Nkv, D], in place."""
        q.copy_(self.q(q))
        k.copy_(self.k(k))


class JointNorms:
    """All query heads of the model at once, and all key heads: mean squares are summed over the ranks.

    q, k    this rank's weights [N, D] and [Nkv, D]
    heads   heads of the model: queries, keys
    copies  [Nkv]: ranks of the group that hold each of this rank's key heads
    """

    def __init__(
        self, *, q: Tensor, k: Tensor, eps: float, heads: tuple[int, int], copies: Tensor, group: Communicator
    ):
        self.q, self.k, self.eps, self.group = q, k, eps, group
        size = q.shape[1]
        self.q_share = torch.full_like(q[:, 0], 1 / (heads[0] * size), dtype=torch.float32)
        self.k_share = 1 / (heads[1] * size * copies.float())

    def __call__(self, q: Tensor, k: Tensor) -> None:
        """q [T, N, D] and k [T, Nkv, D], in place."""
        means = torch.stack((_squares(q) @ self.q_share, _squares(k) @ self.k_share), 1)  # [T, 2]
        if self.group.size > 1:
            self.group.all_reduce(means, out=means)
        factors = (means + self.eps).rsqrt()[:, :, None, None]
        q.copy_(q * factors[:, 0] * self.q)
        k.copy_(k * factors[:, 1] * self.k)


def _squares(x: Tensor) -> Tensor:
    """[T, heads, D] -> float32 [T, heads]: each head's sum of squares."""
    return x.float().square().sum(-1)
