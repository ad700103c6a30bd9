"""fla's chunked kernels, one after another as its gated form runs them; they do without a gate as well.

fla's plain form wants as many heads of k as of v, makes the chunk indices itself, takes a launch more and writes what
lies between. Around a gated call fla has autograd's function, guards and switches, and at each launch it looks for the
tuned form, as Triton does for the compiled one: 300 to 500 µs of host time, of which a recorded call has none.
"""

from typing import Any

import torch
from torch import Tensor

from shardwise.kernel_start import on_device
from shardwise.ops.fla.delta import CHUNK
from shardwise.ops.recorded import recorded
from shardwise.plan_cache import Tensors

_LARGEST = 64 << 20
"""Bytes of results up to which calls are recorded: the kernels of longer prompts take longer than fla's host side"""


def _steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor | None,
    bounds: torch.Tensor | None,
    chunks: torch.Tensor | None,
    offsets: torch.Tensor | None,
    scale: float,
    _tokens: int,
) -> Tensor | tuple[Tensor, Tensor]:
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_fwd_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    cuts = {"cu_seqlens": bounds, "chunk_indices": chunks, "chunk_size": CHUNK}
    states = {"initial_state": state, "output_final_state": state is not None}
    with on_device(q.device.index):
        if g is not None:
            g = chunk_local_cumsum(g, scale=RCP_LN2, **cuts)
        w, u, _ = chunk_gated_delta_rule_fwd_intra(k, v, g=g, beta=beta, **cuts)
        before, u, final = chunk_gated_delta_rule_fwd_h(k, w, u, g=g, chunk_offsets=offsets, **states, **cuts)
        o = chunk_fwd_o(q, k, u, before, g=g, scale=scale, **cuts)
    return o if state is None else (o, final)


def _written(results: Tensors, *args: Any) -> Tensors:
    """fla writes nothing for tokens behind the last bound."""
    return results[0][:, : args[-1]], *results[1:]


_replayed = recorded(largest=_LARGEST, alike=_written)(_steps)


def chunked(
    q: Tensor,  # [B, T, H, K], float16 or bfloat16 as k and v
    k: Tensor,
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV]
    beta: Tensor,
    scale: float,
    tokens: int,  # of T, which the sequences have
    state: Tensor | None = None,  # float32 [sequences, HV, K, V]
    bounds: Tensor | None = None,  # [sequences + 1]; B = 1
    chunks: Tensor | None = None,  # [chunks, 2]: sequence and chunk of it
    offsets: Tensor | None = None,  # [sequences + 1]: chunks before every sequence
) -> Any:
    """Results [B, T, HV, V], those of other tokens undefined; where states are given also those after the last tokens.

    `chunks` and `offsets` spare fla a look at device memory and launches.
    """
    q, k, v, beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous()
    g = g if g is None else g.contiguous()
    return _replayed(q, k, v, beta, g, state, bounds, chunks, offsets, scale, tokens)
