"""What surrounds fla's chunked kernels, and the decode step: launches; the host reads no device memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch
from shardwise.ops.fla import kernels
from shardwise.ops.fla.delta import CHUNK
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.state_batch import token_rows
from shardwise.ops.triton_support import Kernel, Launch, dependent_launch, multiprocessors

# A decode program's numbers of a state and its warps: while there are few programs, and from eight of the second kind a
# multiprocessor on. A full device reads best in large pieces; below that, small ones put more of it to work.
FEW = {"elements": 4096, "warps": 2}
MANY = {"elements": 8192, "warps": 4}
_COPY_ROWS = 16

_launch_load = Kernel(kernels.load_states_kernel)
_launch_chunks = Kernel(kernels.chunks_kernel)
_launch_finish = Kernel(kernels.finish_kernel)
_step = Kernel(kernels.step_kernel)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Prefill(NamedTuple):
    """The prefill sequences of a step: states [slots, HV, K, V] and the token bounds of fla's variable-length form.

    All tokens of the step are given to fla, which leaves those behind the last bound alone: so its result is the
    operator's, without a copy.
    """

    op: str
    batch: Batch
    tokens: int
    cu_seqlen: Tensor
    slots: Tensor
    resumes: Tensor
    cache: Tensor

    @property
    def alone(self) -> bool:
        """One sequence has all tokens: fla needs no bounds."""
        return self.batch.prefill == 1 and self.batch.prefill_tokens == self.tokens

    def _fixed(self) -> tuple:
        return *self.cache.stride()[:3], *self.cache.shape[1:], _COPY_ROWS, _power(self.cache.shape[3])

    def states(self) -> Tensor:
        """Float32 [sequences, HV, K, V] before the first tokens."""
        batch, cache = self.batch, self.cache
        if self.cu_seqlen.numel() < batch.prefill + 1:
            raise ValueError(
                f"{self.op}: cu_seqlen has {self.cu_seqlen.numel()} entries; {batch.prefill} sequences need one more"
            )
        state = torch.empty((batch.prefill, *cache.shape[1:]), dtype=torch.float32, device=cache.device)
        pointers, pdl = (self.cu_seqlen, self.slots, self.resumes, cache, state), dependent_launch(cache.device)
        grid = batch.prefill * cache.shape[1], -(-cache.shape[2] // _COPY_ROWS), 1
        _launch_load(cache.device, grid, pointers, cache.shape[:1], (*self._fixed(), pdl), warps=4, pdl=pdl)
        return state

    def chunks(self) -> tuple[Tensor | None, Tensor | None]:
        """Bounds that fla can trust, [sequences + 1]; (sequence, chunk) of every chunk, int32 [chunks or more, 2]."""
        if self.alone:
            return None, None
        sequences, tokens, device = self.batch.prefill, self.batch.prefill_tokens, self.cache.device
        count = min(tokens, -(-tokens // CHUNK) + sequences - 1)
        bounds = torch.empty(sequences + 1, dtype=self.cu_seqlen.dtype, device=device)
        chunks = torch.empty((count, 2), dtype=torch.int32, device=device)
        pdl = dependent_launch(device)
        fixed = CHUNK, max(_power(sequences), 2), 128, pdl
        grid, free = (-(-count // 128), 1, 1), (sequences, tokens, count)
        _launch_chunks(device, grid, (self.cu_seqlen, bounds, chunks), free, fixed, warps=4, pdl=pdl)
        return bounds, chunks

    def finish(self, out: Tensor, final: Tensor) -> None:
        """Final states into the cache; zeros for tokens without a state and for padding, in `out` [.., HV, V]."""
        batch, cache, pdl = self.batch, self.cache, dependent_launch(out.device)
        width, rows = out.shape[2] * out.shape[3], 16
        states = batch.prefill * cache.shape[1] * -(-cache.shape[2] // _COPY_ROWS)
        free = states, batch.prefill, cache.shape[0], batch.prefill_tokens, batch.tokens, self.tokens
        fixed = *self._fixed(), max(_power(batch.prefill), 2), rows, min(_power(width), 512), pdl
        grid = states + -(-self.tokens // rows), 1, 1
        pointers = self.cu_seqlen, self.slots, cache, final, out, report_word(self.op)
        _launch_finish(out.device, grid, pointers, free, fixed, warps=4, pdl=pdl)


def decode(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    slots: Tensor,
    cache: Tensor,
    out: Tensor,
    scale: float,
    batch: Batch,
) -> tuple[Launch, tuple[Tensor, ...]]:
    """One step of every decode sequence, in the cache; the rows of `out` without a state become zeros.

    How it was launched, and with which tensors.
    """
    heads, K, V = cache.shape[1:]
    (q, q_t), (k, k_t), (v, v_t), (beta, beta_t) = (token_rows(t) for t in (q, k, v, beta))
    gate, g_t = (beta, 0) if g is None else token_rows(g)
    block_k, pdl = _power(K), dependent_launch(cache.device)
    full = batch.decode * heads * V * block_k >= 8 * MANY["elements"] * multiprocessors(cache.device)
    table = MANY if full else FEW
    block_v = min(_power(V), max(1, table["elements"] // block_k))
    fixed = (
        q_t, q.stride(2), k_t, k.stride(2), v_t, v.stride(2), beta_t, g_t,
        *cache.stride()[:3], heads // q.shape[2], heads, K, V, block_k, block_v, g is not None, pdl,
    )  # fmt: skip
    pointers = q, k, v, beta, gate, slots, cache, out, report_word(op)
    launch = Launch(
        _step.form_for(cache.device, pointers, fixed, warps=table["warps"], pdl=pdl),
        (batch.decode * heads * -(-V // block_v), 1, 1),
        (batch.prefill_tokens, batch.prefill, cache.shape[0], scale),
    )
    launch.form(launch.grid, pointers, launch.free)
    return launch, pointers
