"""The gated delta mixer: one projection, a causal convolution, the delta rule, a gated norm of each head, an output
projection.

Source: Yang et al., arXiv:2412.06464, as Qwen3-Next has it. What a layer keeps of a sequence is the last inputs of its
convolution, and a matrix [K, V] of each value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.fla.decode import DeltaGates, DeltaHeads, delta_decode
from shardwise.ops.fla.fla import fla_cached_gated_delta_rule
from shardwise.ops.fla.reference import torch_cached_gated_delta_rule
from shardwise.ops.normalization.reference import torch_l2norm, torch_rmsnorm_gated
from shardwise.ops.normalization.triton import triton_rmsnorm_gated
from shardwise.ops.registry import FLA
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache
from shardwise.parallel.convolution import convolved
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.states import LayerState

HALVES = (torch.float16, torch.bfloat16)


class GatedDeltaMixer:
    """The gated delta rule of this rank's heads. Returns this rank's partial sum.

    projection  x [T, H] -> [channels | output gates | beta | decay], the last two a number for each value head
    conv        [channels, 1, width]
    """

    def __init__(
        self,
        *,
        layer: int,
        heads: DeltaHeads,
        projection: LinearLike,
        conv: Tensor,
        gates: DeltaGates,
        out: LinearLike,
    ):
        self.layer, self.heads = layer, heads
        self.projection, self.conv, self.gates, self.out = projection, conv, gates, out

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        if x.shape[0] == 0:  # the other groups of data-parallel attention have tokens in this step
            return torch.zeros_like(x)
        rows, state, kernels = self.projection(x), cache.states.of(self.layer), cache.states.kernels
        channels = rows[:, : self.heads.channels]
        mixed = convolved(channels, self.conv, None, batch, state.conv, kernels=kernels)
        if not kernels:
            return self.out(self._ruled(mixed, rows, batch.batch_info, batch, state))
        first = x.shape[0] - batch.singles
        singles = rows[first:], batch.input_pos[batch.prefills :], batch.slots[batch.prefills :]
        if not first:
            return self.out(delta_decode(*singles, state.recurrent, self.heads, self.gates))
        out = self._ruled(mixed[:first], rows[:first], batch.prefill_info, batch, state)
        if batch.singles:
            out = torch.cat((out, delta_decode(*singles, state.recurrent, self.heads, self.gates)))
        return self.out(out)

    def _ruled(self, mixed: Tensor, rows: Tensor, info: Tensor, batch: Batch, state: LayerState) -> Tensor:
        """The operators' chain: convolved channels and rows of the projection [T, ...] -> [T, values V]."""
        heads, gates = self.heads, self.gates
        keys, values = heads.keys * heads.key_dim, heads.values * heads.value_dim
        queries_keys, v = mixed.split_with_sizes((2 * keys, values), 1)
        q, k = torch_l2norm(queries_keys.unflatten(1, (2, heads.keys, heads.key_dim))).unbind(1)
        z, beta, decay = rows[:, heads.channels :].split_with_sizes((values, heads.values, heads.values), 1)
        on_fla = rows.is_cuda and FLA.state[0] and rows.dtype in HALVES
        rule = fla_cached_gated_delta_rule if on_fla else torch_cached_gated_delta_rule
        attended = rule(
            q[None],
            k[None],
            v.unflatten(1, (heads.values, heads.value_dim))[None],
            (gates.log_decay * F.softplus(decay.float() + gates.dt_bias))[None],
            beta.sigmoid()[None],
            info,
            batch.cu_seqlen,
            batch.slots,
            batch.resumes,
            state.recurrent,
            heads.key_dim**-0.5,
        )[0].flatten(0, 1)
        norm = triton_rmsnorm_gated if rows.is_cuda else torch_rmsnorm_gated
        normed = norm(attended, gates.norm, z.reshape(attended.shape), gates.eps, heads.value_dim, True)
        return normed.view(len(rows), values)
