"""Launches of the state-space kernels over a flat batch; the host reads no device memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch
from shardwise.ops.dtypes import check_cache, check_float
from shardwise.ops.kernel_launch import Chain, Kernel, Launch
from shardwise.ops.mamba import ssd_kernels as kernels
from shardwise.ops.mamba.checks import check_pieces, check_ssm
from shardwise.ops.mamba.ssd_step_kernels import decode_kernel
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.state_batch import check_counts, token_rows
from shardwise.ops.triton_support import cache_bytes, dependent_launch
from shardwise.plan_cache import allocator

# Tile sizes, warps and pipeline stages, for half precision and states of up to 8192 numbers (see `_output_tiles`).
STEPS = {"heads": 16, "warps": 4}
STATES = {"P": 64, "N": 64, "T": 128, "warps": 4, "stages": 3}
OUTPUTS = {"T": 64, "heads": 1, "warps": 4, "stages": 2}
# A decode program's numbers of a state and its warps: where programs are few or states come from memory, and for a full
# device whose L2 cache holds the states. A sweep on an H200, µs: float32 batch 3 6.0 and 6.05, 4 7.2 and 6.8, 8 12.6
# and 12.4, 12 25.0 and 25.5, 16 35.2 and 35.9, 256 526 and 533; bfloat16 4 4.4 and 4.8, 6 6.1 and 5.4, 12 9.9 and 9.7.
FEW = {"elements": 2048, "warps": 1}
MANY = {"elements": 4096, "warps": 1}

_launch_steps = Kernel(kernels.steps_kernel)
_launch_states = Kernel(kernels.states_kernel)
_launch_outputs = Kernel(kernels.outputs_kernel)
_decode = Kernel(decode_kernel)


class Inputs(NamedTuple):
    """What both phases read, as given: x [b, s, H, P], B, C [b, s, G, N], dt [b, s, H], vectors [H].

    Only one of b and s exceeds 1, so that one stride (x_t, B_t, C_t, dt_t) leads from token to token. A named tuple,
    because it is made at every call.
    """

    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt: Tensor
    dt_bias: Tensor
    slots: Tensor
    cache: Tensor
    out: Tensor
    x_t: int
    B_t: int
    C_t: int
    dt_t: int
    low: float
    high: float

    @property
    def taken(self) -> tuple[Tensor, ...]:
        """The tensors that kernels read, without the metadata of prefill sequences."""
        return self.x, self.dt, self.dt_bias, self.A, self.B, self.C, self.D, self.slots, self.cache


def prepare(
    op: str, given: tuple[Tensor, ...], resumes: Tensor, batch: Batch, limit: list[float], chunk: int
) -> Inputs:
    """Check the arguments, in the order of `Inputs.taken`, and make the result, zeroed where tokens are padding."""
    hidden_states, dt, dt_bias, A, B, C, D, slot_idx, cache = given
    check_ssm(op, hidden_states, A, B, C, D, dt, dt_bias, limit, chunk, cache)
    check_float(op, "hidden_states", hidden_states)
    check_cache(op, "ssm_state_cache", cache)
    if cache.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of ssm_state_cache must be contiguous, got strides {cache.stride()}"
        )
    tokens = hidden_states.shape[0] * hidden_states.shape[1]
    check_counts(op, batch, tokens, slot_idx, resumes)
    x, x_t = token_rows(hidden_states)
    B, B_t = token_rows(B)
    C, C_t = token_rows(C)
    dt, dt_t = token_rows(dt)
    make = torch.empty_like if batch.tokens == tokens else torch.zeros_like
    out = make(x, memory_format=torch.contiguous_format)
    vectors = A.contiguous(), D.contiguous(), dt_bias.contiguous(), slot_idx.contiguous()
    numbers = x_t, B_t, C_t, dt_t, float(limit[0]), float(limit[1])
    return Inputs(x, vectors[0], B, C, vectors[1], dt, vectors[2], vectors[3], cache, out, *numbers)


def _power(n: int) -> int:
    """The next power of two that a matrix product accepts."""
    return max(16, 1 << (n - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Prefill:
    """What the tokens before the decode tokens launch, cut into pieces by `mamba_ssm_prepare_metadata`, but for their
    tensors."""

    launches: Chain
    """On `Inputs.taken`, cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill, the result, the
    workspace and the word for reports"""
    allocate: Callable[[], Tensor]
    """Allocates the workspace of running sums and states, see `ssd_kernels.workspace_parts`"""
    word: Tensor
    """For reports"""


# What a prefill's kernels read and write: `Inputs.taken`, metadata, the result, the workspace and the word for reports.
_TENSORS = (
    *("x", "dt", "dt_bias", "A", "B", "C", "D", "slots", "cache"),
    *("bounds", "resumes", "index", "offset", "owner", "out", "workspace", "word"),
)
_STEPS = ("dt", "dt_bias", "A", "index", "offset", "owner", "bounds", "workspace")
_STATES = ("x", "B", "bounds", "slots", "resumes", "cache", "workspace", "word")
_OUTPUTS = ("x", "B", "C", "D", "index", "offset", "owner", "bounds", "slots", "workspace", "out")


def plan_prefill(op: str, one: Inputs, batch: Batch, metadata: tuple[Tensor, ...], chunk: int) -> Prefill:
    """Checks dtypes and the lengths of the metadata, see `Prefill.launches`."""
    bounds, _, index, offset, owner = metadata
    if not one.x.dtype == one.B.dtype == one.C.dtype != torch.float64:  # they meet in matrix products
        raise TypeError(
            f"{op}: hidden_states, B and C are {one.x.dtype}, {one.B.dtype} and {one.C.dtype}; legal: one dtype of 16 "
            "or 32 bits"
        )
    check_pieces(op, batch, bounds, index, offset, owner)
    tokens, (heads, P), (groups, N) = batch.prefill_tokens, one.x.shape[2:], one.B.shape[2:]
    pieces, ratio, exact = index.numel(), heads // groups, one.x.dtype == torch.float32
    device, slots, pdl = one.x.device, one.cache.shape[0], dependent_launch(one.x.device)
    sums = torch.empty(0, dtype=torch.float32, device=device)  # for its dtype
    word = report_word(op)
    tensors = dict(zip(_TENSORS, (*one.taken, *metadata, one.out, sums, word), strict=True))
    steps = _launch_steps.form_for(
        device,
        tuple(tensors[name] for name in _STEPS),
        (one.dt_t, chunk, 1 << (chunk - 1).bit_length(), STEPS["heads"], pdl),
        warps=STEPS["warps"],
        pdl=pdl,
    )
    x_strides, B_strides, C_strides = (one.x_t, one.x.stride(2)), (one.B_t, one.B.stride(2)), (one.C_t, one.C.stride(2))
    block_p, block_n = min(STATES["P"], _power(P)), min(STATES["N"], _power(N))
    step = _divisor(chunk, 32 if exact else STATES["T"])
    states = _launch_states.form_for(
        device,
        tuple(tensors[name] for name in _STATES),
        (*x_strides, *B_strides, *one.cache.stride()[:3])
        + (ratio, P, N, chunk, step, block_p, block_n, _power(step), 64, exact, pdl),
        warps=STATES["warps"],
        stages=STATES["stages"],
        pdl=pdl,
    )
    block_t, warps, stages = _output_tiles(_power(P) * _power(N), exact)
    block_t, together = min(block_t, _power(chunk)), OUTPUTS["heads"] if ratio % OUTPUTS["heads"] == 0 else 1
    outputs = _launch_outputs.form_for(
        device,
        tuple(tensors[name] for name in _OUTPUTS),
        (*x_strides, *B_strides, *C_strides, ratio, P, N, chunk, _power(P), _power(N), block_t, together, exact, pdl),
        warps=warps,
        stages=stages,
        pdl=pdl,
    )
    tiles = -(-P // block_p) * -(-N // block_n)
    steps_grid, outputs_grid = (pieces, -(-heads // STEPS["heads"]), 1), (pieces * heads // together, 1, 1)
    launches = Chain(
        device,
        _TENSORS,
        (Launch(steps, steps_grid, (batch.prefill, tokens, heads, one.low, one.high)), _STEPS),
        (Launch(states, (batch.prefill, heads, tiles), (pieces, tokens, heads, slots)), _STATES),
        (Launch(outputs, outputs_grid, (batch.prefill, tokens, heads, slots)), _OUTPUTS),
    )
    words = -(-2 * heads * tokens // 4) * 4 + -(-pieces * heads * N * P * one.x.element_size() // 4)
    return Prefill(launches, allocator((words,), torch.float32, device), word)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _output_tiles(size: int, exact: bool) -> tuple[int, int, int]:
    """Tokens a step, warps and stages by the numbers of a state, which must stay in registers."""
    if exact:
        return 16, 4, 1
    if size > 8192:
        return (64, 8, 2) if size <= 16384 else (32, 8, 1)
    return OUTPUTS["T"], OUTPUTS["warps"], OUTPUTS["stages"]


def plan_decode(op: str, one: Inputs, batch: Batch) -> Launch:
    """One step of every decode sequence."""
    (_, _, heads, P), (_, _, groups, N) = one.x.shape, one.B.shape
    cache_slot, cache_h, cache_p, _ = one.cache.stride()
    block_n, pdl = 1 << (N - 1).bit_length(), dependent_launch(one.x.device)
    moved, l2 = batch.decode * heads * P * N * one.cache.element_size(), cache_bytes(one.x.device)
    # A branch costs 1.6 to 3 % where the L2 cache feeds the step; where the memory does, masks cost up to 1 %.
    masked = moved <= 0.75 * l2
    table = MANY if masked and moved >= 0.2 * l2 else FEW
    block_p = min(1 << (P - 1).bit_length(), max(1, table["elements"] // block_n))
    pointers = *one.taken, one.out, report_word(op)
    strides = one.x_t, one.x.stride(2), one.dt_t, one.B_t, one.B.stride(2), one.C_t, one.C.stride(2)
    fixed = (*strides, cache_slot, cache_h, cache_p, heads // groups, P, N, block_p, block_n, masked, pdl)
    return Launch(
        _decode.form_for(one.x.device, pointers, fixed, warps=table["warps"], pdl=pdl),
        (batch.decode * heads * -(-P // block_p), 1, 1),
        (batch.prefill_tokens, batch.prefill, heads, one.cache.shape[0], one.low, one.high),
    )
