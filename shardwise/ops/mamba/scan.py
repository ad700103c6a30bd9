"""Launches of the state-space kernels over a flat batch, without a look at device memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.mamba import ssd_kernels as kernels
from shardwise.ops.mamba.checks import check_ssm
from shardwise.ops.state_batch import check_counts
from shardwise.ops.triton_support import Kernel

# Tile sizes, warps and pipeline stages. None of these kernels spills; OUTPUTS takes 120 registers a thread, so that
# two of its blocks share a multiprocessor.
STATES = {"P": 64, "N": 64, "T": 64, "warps": 4, "stages": 3}
OUTPUTS = {"M": 128, "T": 32, "warps": 8, "stages": 2}
DECODE = {"elements": 2048, "warps": 4}

_launch_steps = Kernel(kernels.steps_kernel)
_launch_states = Kernel(kernels.states_kernel)
_launch_outputs = Kernel(kernels.outputs_kernel)
_launch_decode = Kernel(kernels.decode_kernel)


@dataclass(frozen=True)
class Inputs:
    """What both phases read: x [T, H, P], B, C [T, G, N], dt [T, H], vectors [H]; last dimensions contiguous."""

    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt: Tensor
    dt_bias: Tensor
    slots: Tensor
    cache: Tensor
    limit: list[float]
    out: Tensor


def prepare(
    op: str, hidden_states, A, B, C, D, dt, dt_bias, batch_info_host, slot_idx, resumes, cache, limit, chunk
) -> tuple[Batch, Inputs]:
    """Check the arguments and flatten the tokens. The result is zeroed where tokens are padding."""
    check_ssm(op, hidden_states, A, B, C, D, dt, dt_bias, limit, chunk, cache)
    if cache.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of ssm_state_cache must be contiguous, got strides {cache.stride()}"
        )
    batch = read_batch(op, batch_info_host)
    x, B, C, dt = (_rows(t) for t in (hidden_states, B, C, dt))
    check_counts(op, batch, x.shape[0], slot_idx, resumes)
    make = torch.empty if batch.tokens == x.shape[0] else torch.zeros
    out = make(x.shape, dtype=x.dtype, device=x.device)
    vectors = [t.contiguous() for t in (A, D, dt_bias, slot_idx)]
    return batch, Inputs(x, vectors[0], B, C, vectors[1], dt, vectors[2], vectors[3], cache, limit, out)


def _rows(t: Tensor) -> Tensor:
    """[b, s, ...] as [b * s, ...], its last dimension contiguous."""
    t = t.flatten(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


def _power(n: int) -> int:
    """The next power of two that a matrix product accepts."""
    return max(16, 1 << (n - 1).bit_length())


def prefill(
    one: Inputs, batch: Batch, bounds: Tensor, resumes: Tensor, index: Tensor, offset: Tensor, owner: Tensor, chunk: int
) -> None:
    """The tokens before the decode tokens, cut into pieces by `mamba_ssm_prepare_metadata`."""
    tokens, (heads, P), N = batch.prefill_tokens, one.x.shape[1:], one.B.shape[2]
    pieces, ratio, exact = index.numel(), heads // one.B.shape[1], one.x.dtype == torch.float32
    device, slots = one.x.device, one.cache.shape[0]
    steps = torch.empty((2, heads, tokens), dtype=torch.float32, device=device)
    states = torch.empty((pieces, heads, P, N), dtype=one.x.dtype, device=device)
    cuts, limit = (index, offset, owner, bounds), (float(one.limit[0]), float(one.limit[1]))
    _launch_steps(
        device,
        (pieces, heads, 1),
        (one.dt, one.dt_bias, one.A, *cuts, steps[0], steps[1]),
        (tokens, heads, *limit),
        (one.dt.stride(0), chunk, 1 << (chunk - 1).bit_length()),
        warps=4,
    )
    x_strides, B_strides, C_strides = one.x.stride()[:2], one.B.stride()[:2], one.C.stride()[:2]
    block_p, block_n = min(STATES["P"], _power(P)), min(STATES["N"], _power(N))
    block_t = min(STATES["T"], _power(chunk))
    _launch_states(
        device,
        (batch.prefill, heads, -(-P // block_p) * -(-N // block_n)),
        (one.x, one.B, steps[0], steps[1], bounds, one.slots, resumes, one.cache, states),
        (tokens, heads, slots),
        (*x_strides, *B_strides, *one.cache.stride()[:3], ratio, P, N, chunk, block_p, block_n, block_t, 64, exact),
        warps=STATES["warps"],
        stages=STATES["stages"],
    )
    block_m, block_t = min(64 if exact else OUTPUTS["M"], _power(chunk)), min(OUTPUTS["T"], _power(chunk))
    _launch_outputs(
        device,
        (pieces, heads, -(-chunk // block_m)),
        (one.x, one.B, one.C, one.D, steps[0], steps[1], *cuts, one.slots, states, one.out),
        (tokens, heads, slots),
        (*x_strides, *B_strides, *C_strides, ratio, P, N, chunk, _power(P), _power(N), block_m, block_t, exact),
        warps=OUTPUTS["warps"],
        stages=OUTPUTS["stages"],
    )


def decode(one: Inputs, batch: Batch) -> None:
    """One step of every decode sequence."""
    span = slice(batch.prefill_tokens, batch.tokens)
    x, B, C, dt, out = one.x[span], one.B[span], one.C[span], one.dt[span], one.out[span]
    (heads, P), N = x.shape[1:], B.shape[2]
    block_n = 1 << (N - 1).bit_length()
    block_p = min(1 << (P - 1).bit_length(), max(1, DECODE["elements"] // block_n))
    _launch_decode(
        x.device,
        (batch.decode, heads, -(-P // block_p)),
        (x, dt, one.dt_bias, one.A, B, C, one.D, one.slots[batch.prefill :], one.cache, out),
        (heads, one.cache.shape[0], float(one.limit[0]), float(one.limit[1])),
        (*x.stride()[:2], dt.stride(0), *B.stride()[:2], *C.stride()[:2], *one.cache.stride()[:3])
        + (heads // B.shape[1], P, N, block_p, block_n),
        warps=DECODE["warps"],
    )
