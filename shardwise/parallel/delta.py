"""The gated delta mixer: one projection, a causal convolution, the delta rule, a gated norm of each head, an output
projection.

Source: Yang et al., arXiv:2412.06464, as Qwen3-Next has it. What a layer keeps of a sequence is the last inputs of its
convolution, and a matrix [K, V] of each value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.fla import prefill
from shardwise.ops.fla.decode import DeltaGates, DeltaHeads, delta_decode
from shardwise.ops.fla.reference import torch_cached_gated_delta_rule
from shardwise.ops.normalization.reference import torch_l2norm, torch_rmsnorm_gated
from shardwise.ops.normalization.triton import triton_rmsnorm_gated
from shardwise.ops.triton_support import dependent_launch
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache
from shardwise.parallel.convolution import convolved
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.states import LayerState, StateCache, StateSpans


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[T, ...] of several projections as rows of one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class GatedDeltaMixer:
    """The gated delta rule of this rank's heads. Returns this rank's partial sum.

    in_projs  x [T, H], side by side -> [channels | output gates | beta | decay], the last two a number for each value
              head
    conv      [channels, 1, width]
    """

    def __init__(
        self,
        *,
        layer: int,
        heads: DeltaHeads,
        in_projs: tuple[LinearLike, ...],
        conv: Tensor,
        gates: DeltaGates,
        out: LinearLike,
    ):
        self.layer, self.heads = layer, heads
        self.in_projs, self.conv, self.gates, self.out = in_projs, conv, gates, out
        self._norm = gates.norm.repeat(heads.values)

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        if x.shape[0] == 0:  # the other groups of data-parallel attention have tokens in this step
            return torch.zeros_like(x)
        return self.out(self.mix(side_by_side([in_proj(x) for in_proj in self.in_projs]), batch, cache.states))

    def mix(self, rows: Tensor, spans: StateSpans, states: StateCache) -> Tensor:
        """From what `in_projs` give, which may be overwritten, to what `out` takes, [T, values V]."""
        state, kernels = states.of(self.layer), states.kernels
        mixed = convolved(rows[:, : self.heads.channels], self.conv, None, spans, state.conv, kernels=kernels)
        if not kernels:
            return self._ruled(mixed, rows, spans.batch_info, spans, state)
        prefills, tokens, singles = spans.batch_info.tolist()
        parts = []
        if tokens:
            parts.append(self._prompts(mixed[:tokens], rows[:tokens], prefills, spans, state))
        if singles:
            slots, pdl = spans.slots[prefills:], dependent_launch(rows.device)
            parts.append(delta_decode(rows[tokens:], slots, state.recurrent, self.heads, self.gates, pdl=pdl))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prompts(self, mixed: Tensor, rows: Tensor, count: int, spans: StateSpans, state: LayerState) -> Tensor:
        """The first `count` sequences on a GPU. What the kernels do not take waits for the device."""
        if not prefill.takes(self.heads):
            return self._ruled(mixed, rows, torch.tensor([count, len(rows), 0], dtype=torch.int32), spans, state)
        attended = prefill.delta_prefill(
            rows,
            spans.cu_seqlen[: count + 1],
            spans.slots,
            spans.resumes,
            state.recurrent,
            self.heads,
            self.gates,
            pdl=dependent_launch(rows.device),
        )
        return self._normed(attended, rows)

    def _ruled(self, mixed: Tensor, rows: Tensor, info: Tensor, spans: StateSpans, state: LayerState) -> Tensor:
        """PyTorch's operators: convolved channels and rows of the projection [T, ...] -> [T, values V]."""
        heads, gates = self.heads, self.gates
        queries_keys, v = mixed.split_with_sizes((2 * heads.keys * heads.key_dim, heads.values * heads.value_dim), 1)
        q, k = torch_l2norm(queries_keys.unflatten(1, (2, heads.keys, heads.key_dim))).unbind(1)
        beta, decay = rows[:, -2 * heads.values :].chunk(2, 1)
        attended = torch_cached_gated_delta_rule(
            q[None],
            k[None],
            v.unflatten(1, (heads.values, heads.value_dim))[None],
            (gates.log_decay * F.softplus(decay.float() + gates.dt_bias))[None],
            beta.sigmoid()[None],
            info,
            spans.cu_seqlen,
            spans.slots,
            spans.resumes,
            state.recurrent,
            heads.key_dim**-0.5,
        )[0]
        return self._normed(attended, rows)

    def _normed(self, attended: Tensor, rows: Tensor) -> Tensor:
        """attended [T, values, V], normed by heads and gated by rows of the projection: [T, values V]."""
        heads, gates = self.heads, self.gates
        gate = rows[:, heads.channels : -2 * heads.values]
        norm = triton_rmsnorm_gated if rows.is_cuda else torch_rmsnorm_gated
        return norm(attended.flatten(1), self._norm, gate, gates.eps, heads.value_dim, True)
