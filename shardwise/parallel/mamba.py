"""The Mamba-2 mixer: one projection, a causal convolution, the state-space scan, a gated norm, an output projection.

Source: Dao and Gu, arXiv:2405.21060. Heads are cut over the ranks by groups. Where a group's heads lie on several
ranks, each of them has the group's B and C, and the norm over the group takes a mean over these ranks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.ops.mamba.reference import torch_cached_ssm
from shardwise.ops.mamba.triton import triton_cached_ssm
from shardwise.ops.normalization.gated_shared import norm_of_part, squares_of_part
from shardwise.ops.normalization.reference import torch_rmsnorm_gated
from shardwise.ops.normalization.triton import triton_rmsnorm_gated
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache
from shardwise.parallel.convolution import convolved
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.states import LayerState, StateCache, StateSpans


class GatedNorm:
    """RMS norm over each group of channels, with a SiLU gate before it (or, `after`, behind it).

    weight   [I], of this rank's channels
    size     channels of a group, those of other ranks included
    group    the ranks that hold `groups` groups, this one a part of number `number`; None: each has whole ones
    """

    def __init__(
        self,
        *,
        weight: Tensor,
        eps: float,
        size: int,
        after: bool = False,
        group: Communicator | None = None,
        groups: int = 1,
        number: int = 0,
    ):
        self.weight, self.eps, self.size, self.after = weight, eps, size, after
        self.group, self.groups, self.number = group, groups, number

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [T, I] -> [T, I] in x's dtype."""
        if self.group is None:
            norm = triton_rmsnorm_gated if x.is_cuda else torch_rmsnorm_gated
            return norm(x, self.weight, gate, self.eps, self.size, self.after)
        if x.is_cuda:
            return self._by_kernels(x, gate, self.group)
        opened = F.silu(gate.float())
        wide = x.float() if self.after else x.float() * opened
        squares = wide.new_zeros(x.shape[0], self.groups)
        squares[:, self.number] = wide.square().sum(1)
        self.group.all_reduce(squares, out=squares)
        normed = wide * torch.rsqrt(squares[:, self.number, None] / self.size + self.eps)
        return self.weight * (normed * opened if self.after else normed).to(x.dtype)

    def _by_kernels(self, x: Tensor, gate: Tensor, group: Communicator) -> Tensor:
        squares = squares_of_part(x, gate, groups=self.groups, number=self.number, after=self.after)
        group.all_reduce(squares, out=squares)
        return norm_of_part(
            x, gate, self.weight, squares, number=self.number, size=self.size, eps=self.eps, after=self.after
        )


def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """A gate without a norm: x * silu(gate)."""
    return F.silu(gate).mul_(x)


class MambaMixer:
    """Mamba-2 with this rank's H heads in its G groups. Returns this rank's partial sum.

    in_proj     x [T, hidden] -> [z | x | B | C | dt], of H * P, H * P, G * N, G * N and H elements
    conv        [channels, 1, K] over [x | B | C], conv_bias [channels]
    A           negative; as D and dt_bias float32 [H]
    dt_limits   of the time steps, after the softplus
    chunk       tokens that the scan of a prompt takes at once
    """

    def __init__(
        self,
        *,
        layer: int,
        heads: int,
        groups: int,
        head_dim: int,
        state: int,
        in_proj: LinearLike,
        conv: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        dt_limits: tuple[float, float],
        chunk: int,
        norm: Callable[[Tensor, Tensor], Tensor],
        out: LinearLike,
    ):
        self.layer, self.heads, self.groups = layer, heads, groups
        self.in_proj, self.norm, self.out = in_proj, norm, out
        self.conv, self.conv_bias = conv, conv_bias
        self.A, self.D, self.dt_bias = A, D, dt_bias
        self.dt_limits, self.chunk = list(dt_limits), chunk
        inner, shared = heads * head_dim, groups * state
        self._parts = inner, inner + 2 * shared, heads
        self._convolved = inner, shared, shared

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        if x.shape[0] == 0:  # the other groups of data-parallel attention have tokens in this step
            return torch.zeros_like(x)
        return self.out(self.mix(self.in_proj(x), batch, cache.states))

    def mix(self, projected: Tensor, batch: StateSpans, states: StateCache) -> Tensor:
        """From what `in_proj` gives, which may be overwritten, to what `out` takes, [T, H * P]."""
        state, kernels = states.of(self.layer), states.kernels
        gate, rows, dt = projected.split_with_sizes(self._parts, 1)
        rows = convolved(rows, self.conv, self.conv_bias, batch, state.conv, kernels=kernels)
        return self.norm(self._scan(rows, dt, batch, state, kernels=kernels), gate)

    def _scan(self, rows: Tensor, dt: Tensor, batch: StateSpans, state: LayerState, *, kernels: bool) -> Tensor:
        """rows [T, x | B | C] and dt [T, H] -> [T, H * P]."""
        parts, units = rows[None].split_with_sizes(self._convolved, 2), (self.heads, self.groups, self.groups)
        x, B, C = (part.unflatten(2, (count, -1)) for part, count in zip(parts, units, strict=True))
        given = x, self.A, B, C, self.D, dt[None], self.dt_bias, batch.batch_info
        spans = batch.cu_seqlen, batch.slots, batch.resumes
        scanning = state.recurrent, self.dt_limits, self.chunk
        if kernels:
            out = triton_cached_ssm(*given, *spans, *batch.pieces(self.chunk), *scanning)
        else:
            out = torch_cached_ssm(*given, batch.seq_len, *spans, *scanning)
        return out[0].flatten(1)
