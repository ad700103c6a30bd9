"""The state-space scan in five separate kernels, as the mamba-ssm package arranges it: a peer for benchmarks.

Written from the formulae (Dao and Gu, arXiv:2405.21060, section 6): running sums of dt A; the state that every chunk
adds, float32; those states passed from chunk to chunk; C B^T of every chunk and group, float32; the outputs from the
passed states and from C B^T under the decay. One sequence whose length is a multiple of the chunk, tiles chosen by
Triton's autotuner on the device. Inputs as in `torch_ssm`.
"""

import torch
from torch import Tensor

from shardwise.ops.mamba.ssd_kernels import time_step
from shardwise.ops.triton_support import interpreting, tl, triton


def _tuned(names: tuple[str, ...], choices: list[tuple[int, ...]], key: list[str]):
    """Autotune over tiles, the last two numbers of a choice being warps and stages."""
    if interpreting():
        return lambda kernel: kernel
    configs = [
        triton.Config(dict(zip(names, choice[:-2], strict=True)), num_warps=choice[-2], num_stages=choice[-1])
        for choice in choices
    ]
    return triton.autotune(configs, key=key)


@triton.jit
def sums_kernel(dt_ptr, bias_ptr, A_ptr, step_ptr, sum_ptr, tokens, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """Time steps and running sums of dt A inside a chunk, [H, T]."""
    head = tl.arange(0, HEADS)
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    dt = tl.load(dt_ptr + row[:, None] * HEADS + head[None, :])
    step = time_step(dt, tl.load(bias_ptr + head)[None, :], 0.0, float("inf"))
    total = tl.cumsum(step * tl.load(A_ptr + head).to(tl.float32)[None, :], axis=0)
    target = head[None, :] * tokens + row[:, None]
    tl.store(step_ptr + target, step)
    tl.store(sum_ptr + target, total)


@_tuned(
    ("BLOCK_P", "BLOCK_N", "BLOCK_T"),
    [(64, 64, 32, 4, 4), (64, 128, 32, 4, 4), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 128, 64, 8, 3)],
    ["CHUNK"],
)
@triton.jit
def chunk_state_kernel(
    x_ptr, B_ptr, step_ptr, sum_ptr, state_ptr, tokens,
    HEADS: tl.constexpr, RATIO: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the state [P, N] of one head."""
    blocks: tl.constexpr = N // BLOCK_N
    p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    last = tl.load(sum_ptr + head * tokens + (chunk + 1) * CHUNK - 1)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for begin in range(0, CHUNK, BLOCK_T):
        row = chunk * CHUNK + begin + tl.arange(0, BLOCK_T)
        x = tl.load(x_ptr + (row[None, :] * HEADS + head) * P + p[:, None])
        B = tl.load(B_ptr + (row[:, None] * (HEADS // RATIO) + head // RATIO) * N + n[None, :]).to(tl.float32)
        weight = tl.load(step_ptr + head * tokens + row) * tl.exp(last - tl.load(sum_ptr + head * tokens + row))
        state += tl.dot(x, (B * weight[:, None]).to(x.dtype))
    tl.store(state_ptr + ((chunk * HEADS + head) * P + p[:, None]) * N + n[None, :], state)


@triton.jit
def pass_kernel(
    state_ptr, sum_ptr, initial_ptr, passed_ptr, final_ptr, tokens,
    HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, for BLOCK numbers of one head's state."""
    i, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    state = tl.load(initial_ptr + head * SIZE + i).to(tl.float32)
    for chunk in range(tokens // CHUNK):
        offset = (chunk * HEADS + head).to(tl.int64) * SIZE + i
        tl.store(passed_ptr + offset, state.to(passed_ptr.dtype.element_ty))
        decay = tl.exp(tl.load(sum_ptr + head * tokens + (chunk + 1) * CHUNK - 1))
        state = state * decay + tl.load(state_ptr + offset)
    tl.store(final_ptr + head * SIZE + i, state.to(final_ptr.dtype.element_ty))


@_tuned(("BLOCK_M", "BLOCK_K"), [(64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3)], ["CHUNK"])
@triton.jit
def products_kernel(
    B_ptr, C_ptr, product_ptr, GROUPS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C B^T [CHUNK, CHUNK] of one chunk and group, on and below the diagonal blocks."""
    blocks: tl.constexpr = CHUNK // BLOCK_M
    rows, columns = tl.program_id(0) // blocks * BLOCK_M, tl.program_id(0) % blocks * BLOCK_M
    if columns > rows:
        return
    chunk, group = tl.program_id(1), tl.program_id(2)
    i, j = rows + tl.arange(0, BLOCK_M), columns + tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for begin in range(0, N, BLOCK_K):
        n = begin + tl.arange(0, BLOCK_K)
        C = tl.load(C_ptr + ((chunk * CHUNK + i)[:, None] * GROUPS + group) * N + n[None, :])
        B = tl.load(B_ptr + ((chunk * CHUNK + j)[None, :] * GROUPS + group) * N + n[:, None])
        product = tl.dot(C, B, product)
    target = product_ptr + ((chunk * GROUPS + group).to(tl.int64) * CHUNK + i[:, None]) * CHUNK + j[None, :]
    tl.store(target, product)


@_tuned(
    ("BLOCK_M", "BLOCK_T"),
    [(128, 64, 4, 3), (128, 32, 4, 4), (64, 32, 4, 4), (64, 64, 4, 3), (128, 64, 8, 3)],
    ["CHUNK"],
)
@triton.jit
def scan_kernel(
    x_ptr, C_ptr, D_ptr, step_ptr, sum_ptr, product_ptr, passed_ptr, out_ptr, tokens,
    HEADS: tl.constexpr, RATIO: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_M outputs of one chunk and head."""
    chunk, head, first = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BLOCK_M
    i, p, n = first + tl.arange(0, BLOCK_M), tl.arange(0, P), tl.arange(0, N)
    row, group = chunk * CHUNK + i, head // RATIO
    total = tl.load(sum_ptr + head * tokens + row)
    C = tl.load(C_ptr + (row[:, None] * (HEADS // RATIO) + group) * N + n[None, :])
    state = tl.load(passed_ptr + ((chunk * HEADS + head).to(tl.int64) * P + p[None, :]) * N + n[:, None])
    out = tl.dot(C, state) * tl.exp(total)[:, None]
    products = product_ptr + (chunk * (HEADS // RATIO) + group).to(tl.int64) * CHUNK * CHUNK + i[:, None] * CHUNK
    for begin in range(0, first + BLOCK_M, BLOCK_T):
        j = begin + tl.arange(0, BLOCK_T)
        other = chunk * CHUNK + j
        gap = tl.exp(total[:, None] - tl.load(sum_ptr + head * tokens + other)[None, :])
        score = tl.load(products + j[None, :]) * gap * tl.load(step_ptr + head * tokens + other)[None, :]
        score = tl.where(j[None, :] <= i[:, None], score, 0.0)
        x = tl.load(x_ptr + (other[:, None] * HEADS + head) * P + p[None, :])
        out += tl.dot(score.to(x.dtype), x)
    target = (row[:, None] * HEADS + head) * P + p[None, :]
    out += tl.load(x_ptr + target).to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty))


def separate_scan(inputs: tuple[Tensor, ...], state: Tensor, chunk: int = 256) -> Tensor:
    """inputs: x [1, T, H, P], A [H], B, C [1, T, G, N], D [H], dt [1, T, H], dt_bias [H], all contiguous; H, P and N
    powers of two, T a multiple of chunk. Starts from `state` [H, P, N] and replaces it with the final one. -> y, as x.
    """
    x, A, B, C, D, dt, bias = inputs
    (tokens, heads, P), (groups, N) = x.shape[1:], B.shape[2:]
    chunks, ratio, tiles = tokens // chunk, heads // groups, {}
    if interpreting():
        tiles = {"BLOCK_P": P, "BLOCK_N": N, "BLOCK_T": chunk // 2, "BLOCK_M": chunk // 2, "BLOCK_K": N}
    steps, sums = torch.empty((2, heads, tokens), dtype=torch.float32, device=x.device)
    sums_kernel[(chunks,)](dt, bias, A, steps, sums, tokens, heads, chunk, num_warps=8)
    added = torch.empty((chunks, heads, P, N), dtype=torch.float32, device=x.device)

    def choose(*names):
        return {name: tiles[name] for name in names if name in tiles}

    chunk_state_kernel[lambda m: (P // m["BLOCK_P"] * (N // m["BLOCK_N"]), chunks, heads)](
        x, B, steps, sums, added, tokens, heads, ratio, P, N, chunk, **choose("BLOCK_P", "BLOCK_N", "BLOCK_T")
    )
    passed = torch.empty((chunks, heads, P, N), dtype=x.dtype, device=x.device)
    pass_kernel[(P * N // 256, heads)](added, sums, state, passed, state, tokens, heads, P * N, chunk, 256)
    products = torch.empty((chunks, groups, chunk, chunk), dtype=torch.float32, device=x.device)
    products_kernel[lambda m: ((chunk // m["BLOCK_M"]) ** 2, chunks, groups)](
        B, C, products, groups, N, chunk, **choose("BLOCK_M", "BLOCK_K")
    )
    out = torch.empty_like(x)
    scan_kernel[lambda m: (chunk // m["BLOCK_M"], chunks, heads)](
        x, C, D, steps, sums, products, passed, out, tokens, heads, ratio, P, N, chunk, **choose("BLOCK_M", "BLOCK_T")
    )
    return out
