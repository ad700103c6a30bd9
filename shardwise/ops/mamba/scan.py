"""Launches of the state-space kernels over a flat batch, without a look at device memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch
from shardwise.ops.mamba import ssd_kernels as kernels
from shardwise.ops.mamba.checks import check_pieces, check_ssm
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.state_batch import check_counts, many_or_few, token_rows
from shardwise.ops.triton_support import Kernel, Launch, dependent_launch

# Tile sizes, warps and pipeline stages, for half precision and states of up to 8192 numbers (see `_output_tiles`).
STEPS = {"heads": 16, "warps": 4}
STATES = {"P": 64, "N": 64, "T": 128, "warps": 4, "stages": 3}
OUTPUTS = {"T": 64, "heads": 1, "warps": 4, "stages": 2}
# A decode program's numbers of a state and its warps; the second for a device full of float32 states (a sweep on an
# H200: 12.5 instead of 12.8 µs at batch 8, FlashInfer 12.6; 16-bit states are 2 to 4 % quicker with the first).
FEW = {"elements": 2048, "warps": 1}
MANY = {"elements": 4096, "warps": 1}

_launch_steps = Kernel(kernels.steps_kernel)
_launch_states = Kernel(kernels.states_kernel)
_launch_outputs = Kernel(kernels.outputs_kernel)
_decode = Kernel(kernels.decode_kernel)


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


def prepare(
    op: str, hidden_states, A, B, C, D, dt, dt_bias, batch: Batch, slot_idx, resumes, cache, limit, chunk
) -> Inputs:
    """Check the arguments and make the result, zeroed where tokens are padding."""
    check_ssm(op, hidden_states, A, B, C, D, dt, dt_bias, limit, chunk, cache)
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


def prefill(
    op: str,
    one: Inputs,
    batch: Batch,
    bounds: Tensor,
    resumes: Tensor,
    index: Tensor,
    offset: Tensor,
    owner: Tensor,
    chunk: int,
) -> None:
    """The tokens before the decode tokens, cut into pieces by `mamba_ssm_prepare_metadata`."""
    check_pieces(op, batch, bounds, index, offset, owner)
    bounds, resumes, index, offset, owner = (t.contiguous() for t in (bounds, resumes, index, offset, owner))
    tokens, (heads, P), (groups, N) = batch.prefill_tokens, one.x.shape[2:], one.B.shape[2:]
    pieces, ratio, exact = index.numel(), heads // groups, one.x.dtype == torch.float32
    device, slots, cuts = one.x.device, one.cache.shape[0], (index, offset, owner, bounds)
    totals, levels = torch.empty((2, heads, tokens), dtype=torch.float32, device=device)
    states = torch.empty((pieces, heads, N, P), dtype=one.x.dtype, device=device)
    _launch_steps(
        device,
        (pieces, -(-heads // STEPS["heads"]), 1),
        (one.dt, one.dt_bias, one.A, *cuts, totals, levels),
        (batch.prefill, tokens, heads, one.low, one.high),
        (one.dt_t, chunk, 1 << (chunk - 1).bit_length(), STEPS["heads"]),
        warps=STEPS["warps"],
    )
    x_strides, B_strides, C_strides = (one.x_t, one.x.stride(2)), (one.B_t, one.B.stride(2)), (one.C_t, one.C.stride(2))
    block_p, block_n = min(STATES["P"], _power(P)), min(STATES["N"], _power(N))
    step = _divisor(chunk, 32 if exact else STATES["T"])
    _launch_states(
        device,
        (batch.prefill, heads, -(-P // block_p) * -(-N // block_n)),
        (one.x, one.B, totals, levels, bounds, one.slots, resumes, one.cache, states, report_word(op)),
        (pieces, tokens, heads, slots),
        (*x_strides, *B_strides, *one.cache.stride()[:3])
        + (ratio, P, N, chunk, step, block_p, block_n, _power(step), 64, exact),
        warps=STATES["warps"],
        stages=STATES["stages"],
    )
    block_t, warps, stages = _output_tiles(_power(P) * _power(N), exact)
    block_t, together = min(block_t, _power(chunk)), OUTPUTS["heads"] if ratio % OUTPUTS["heads"] == 0 else 1
    _launch_outputs(
        device,
        (pieces * heads // together, 1, 1),
        (one.x, one.B, one.C, one.D, totals, levels, *cuts, one.slots, states, one.out),
        (batch.prefill, tokens, heads, slots),
        (*x_strides, *B_strides, *C_strides, ratio, P, N, chunk, _power(P), _power(N), block_t, together, exact),
        warps=warps,
        stages=stages,
    )


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


def decode(op: str, one: Inputs, batch: Batch) -> Launch:
    """One step of every decode sequence; how it was launched."""
    (_, _, heads, P), (_, _, groups, N) = one.x.shape, one.B.shape
    cache_slot, cache_h, cache_p, _ = one.cache.stride()
    block_n, pdl = 1 << (N - 1).bit_length(), dependent_launch(one.x.device)
    wide = MANY if one.cache.dtype == torch.float32 else FEW
    table = many_or_few(batch.decode * heads * P * block_n, one.x.device, wide, FEW)
    block_p = min(1 << (P - 1).bit_length(), max(1, table["elements"] // block_n))
    pointers = (one.x, one.dt, one.dt_bias, one.A, one.B, one.C, one.D, one.slots, one.cache, one.out)
    pointers = (*pointers, report_word(op))
    strides = one.x_t, one.x.stride(2), one.dt_t, one.B_t, one.B.stride(2), one.C_t, one.C.stride(2)
    fixed = (*strides, cache_slot, cache_h, cache_p, heads // groups, P, N, block_p, block_n, pdl)
    launch = Launch(
        _decode.form_for(one.x.device, pointers, fixed, warps=table["warps"], pdl=pdl),
        (batch.decode * heads * -(-P // block_p), 1, 1),
        (batch.prefill_tokens, batch.prefill, heads, one.cache.shape[0], one.low, one.high),
    )
    launch.form(launch.grid, pointers, launch.free)
    return launch
