"""What surrounds fla's chunked kernels, and the decode step: launches; the host reads no device memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch
from shardwise.ops.fla import kernels
from shardwise.ops.fla.delta import CHUNK
from shardwise.ops.kernel_launch import Kept, Kernel, Launch
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.repeated import Repeated
from shardwise.ops.scratch import KEPT_TOKENS, Scratch, shared
from shardwise.ops.state_batch import token_rows
from shardwise.ops.triton_support import dependent_launch, multiprocessors
from shardwise.plan_cache import allocator

# A decode program's numbers of a state and its warps: while there are few programs, and from eight of the second kind a
# multiprocessor on. A full device reads best in large pieces; below that, small ones put more of it to work.
FEW = {"elements": 4096, "warps": 2}
MANY = {"elements": 8192, "warps": 4}
_COPY_ROWS = 16

_load, _chunks, _finish, _step = (
    Kernel(kernel)
    for kernel in (kernels.load_states_kernel, kernels.chunks_kernel, kernels.finish_kernel, kernels.step_kernel)
)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Prefill:
    """What surrounds fla's kernels in a step with prefill sequences, but for its tensors.

    All tokens of the step are given to fla, which leaves those behind the last bound alone: so its result is the
    operator's, without a copy.
    """

    rooms: "Scratch[Room] | None"
    """Of a short prompt of one sequence"""
    states: Callable[[], Tensor]
    """Allocates float32 [sequences, HV, K, V] where there is no room"""
    load: Launch
    bounds: Callable[[], Tensor]
    """Allocates [sequences + 1]"""
    chunks: Callable[[], Tensor]
    """Allocates int32 [chunks or more, 2]"""
    offsets: Callable[[], Tensor]
    """Allocates int32 [sequences + 1]"""
    cut: Launch | None
    """None where one sequence has all tokens: fla needs no bounds"""
    finish: Launch
    word: Tensor
    """For reports"""
    tokens: int
    """Of the prefill sequences"""

    def before(
        self, room: "Room | None", cu_seqlen: Tensor, slots: Tensor, resumes: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """States before the first tokens; bounds that fla can trust; (sequence, chunk) of every chunk; the number of
        chunks before every sequence."""
        if room is None:
            state = self.states()
            self.load.form(self.load.grid, (cu_seqlen, slots, resumes, cache, state), self.load.free)
        else:
            state = room.state
            room.load((cu_seqlen, slots, resumes, cache))
        if self.cut is None:
            return state, None, None, None
        bounds, chunks, offsets = self.bounds(), self.chunks(), self.offsets()
        self.cut.form(self.cut.grid, (cu_seqlen, bounds, chunks, offsets), self.cut.free)
        return state, bounds, chunks, offsets

    def after(
        self, room: "Room | None", cu_seqlen: Tensor, slots: Tensor, cache: Tensor, final: Tensor, out: Tensor
    ) -> None:
        """Final states into the cache; zeros for tokens without a state and for padding, in `out` [1, T, HV, V]."""
        if room is None:
            self.finish.form(self.finish.grid, (cu_seqlen, slots, cache, final, out, self.word), self.finish.free)
        else:
            room.finish((cu_seqlen, slots, cache, final, out))


class Room(NamedTuple):
    """What calls of one short prompt keep for the next one."""

    state: Tensor
    """float32 [1, HV, K, V]"""
    load: Repeated
    finish: Repeated


def plan_prefill(
    op: str, batch: Batch, v: Tensor, cu_seqlen: Tensor, slots: Tensor, resumes: Tensor, cache: Tensor
) -> Prefill:
    """Of the step's tokens, v [1, T, HV, V]. ValueError for bounds of fewer sequences."""
    sequences, tokens, device = batch.prefill, v.shape[1], cache.device
    if cu_seqlen.numel() < sequences + 1:
        raise ValueError(f"{op}: cu_seqlen has {cu_seqlen.numel()} entries; {sequences} sequences need one more")
    (slots_in_all, heads, keys, values), pdl = cache.shape, dependent_launch(device)
    fixed = *cache.stride()[:3], heads, keys, values, _COPY_ROWS, _power(values)
    state, word = torch.empty(0, dtype=torch.float32, device=device), report_word(op)  # all states are float32
    copies = -(-keys // _COPY_ROWS)
    load = Launch(
        _load.form_for(device, (cu_seqlen, slots, resumes, cache, state), (*fixed, pdl), warps=4, pdl=pdl),
        (sequences * heads, copies, 1),
        (slots_in_all,),
    )
    width, rows, states = heads * values, 16, sequences * heads * copies
    finish = Launch(
        _finish.form_for(
            device,
            (cu_seqlen, slots, cache, state, v, word),
            (*fixed, max(_power(sequences), 2), rows, min(_power(width), 512), pdl),
            warps=4,
            pdl=pdl,
        ),
        (states + -(-tokens // rows), 1, 1),
        (states, sequences, slots_in_all, batch.prefill_tokens, batch.tokens, tokens),
    )
    count = min(batch.prefill_tokens, -(-batch.prefill_tokens // CHUNK) + sequences - 1)
    bounds, chunks = allocator((sequences + 1,), cu_seqlen.dtype, device), allocator((count, 2), torch.int32, device)
    offsets = allocator((sequences + 1,), torch.int32, device)
    alone = sequences == 1 and batch.prefill_tokens == tokens
    cut = None if alone else Launch(
        _chunks.form_for(
            device,
            (cu_seqlen, bounds(), chunks(), offsets()),
            (CHUNK, max(_power(sequences), 2), 128, pdl),
            warps=4,
            pdl=pdl,
        ),
        (-(-count // 128), 1, 1),
        (sequences, batch.prefill_tokens, count),
    )  # fmt: skip
    make = allocator((sequences, heads, keys, values), torch.float32, device)

    def room() -> Room:
        state = shared(device, torch.float32, (1, heads, keys, values)).take()
        return Room(state, Repeated(device, load, Kept((state,))), Repeated(device, finish, Kept((word,))))

    rooms = Scratch(device, tokens, room) if sequences == 1 and tokens <= KEPT_TOKENS else None
    return Prefill(rooms, make, load, bounds, chunks, offsets, cut, finish, word, batch.prefill_tokens)


def plan_decode(
    op: str, batch: Batch, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, slots: Tensor,
    cache: Tensor, scale: float,
) -> Launch:  # fmt: skip
    """One step of every decode sequence, in the cache: of q, k, v, beta, g (beta where there is no gate), slots, cache,
    result and report. Rows of the result without a state become zeros."""
    heads, K, V = cache.shape[1:]
    gate = beta if g is None else g
    block_k, pdl = _power(K), dependent_launch(cache.device)
    full = batch.decode * heads * V * block_k >= 8 * MANY["elements"] * multiprocessors(cache.device)
    table = MANY if full else FEW
    block_v = min(_power(V), max(1, table["elements"] // block_k))
    fixed = (
        _token_stride(q), q.stride(2), _token_stride(k), k.stride(2), _token_stride(v), v.stride(2),
        _token_stride(beta), 0 if g is None else _token_stride(g),
        *cache.stride()[:3], heads // q.shape[2], heads, K, V, block_k, block_v, g is not None, pdl,
    )  # fmt: skip
    pointers = q, k, v, beta, gate, slots, cache, v, report_word(op)
    return Launch(
        _step.form_for(cache.device, pointers, fixed, warps=table["warps"], pdl=pdl),
        (batch.decode * heads * -(-V // block_v), 1, 1),
        (batch.prefill_tokens, batch.prefill, cache.shape[0], scale),
    )


def _token_stride(t: Tensor) -> int:
    return token_rows(t)[1]
