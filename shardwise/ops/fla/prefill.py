"""Prompts of gated delta layers, from the convolved projection to the rule's results, in two kernels.

Not a registered operator: the runtime's layers call it directly. The first kernel takes all chunks of 64 tokens at
once: unit queries and keys, gates, and the inverse that turns a chunk's values into updates of the state before it
(`delta.py`). The second walks over each sequence's chunks with the state. Nothing waits for the device.

bf16, fp16 or float32 (whose tiles spill), sums in float32. CUDA only, or Triton's interpreter with fp16 and float32.
"""

import torch
from torch import Tensor

from shardwise.ops.fla.decode import DeltaGates, DeltaHeads
from shardwise.ops.fla.delta import CHUNK
from shardwise.ops.fla.prefill_kernels import chunk_kernel, walk_kernel
from shardwise.ops.triton_support import interpreting, triton

MOST_ELEMENTS = 128
"""Of a head's keys and of its values: their tiles lie in registers and shared memory."""
COLUMNS = 32
"""Of a state, for each program of the walk: with four of them for 128 columns a sequence fills the device."""
WALK_WARPS, WALK_STAGES = 4, 2


def chunk_warps(block_k: int, block_v: int) -> int:
    """Of a program for one chunk. For 1024 tokens of 32 heads of 128 elements four took 49 µs on an H100, eight 96. Of
    smaller heads, with four the assembler of Triton 3.6 spoils products (`tests/ops/fla/test_delta_compile.py`)."""
    return 4 if block_k == block_v == MOST_ELEMENTS else 8


def takes(heads: DeltaHeads) -> bool:
    """Whether the kernels are made for these."""
    return max(heads.key_dim, heads.value_dim) <= MOST_ELEMENTS


def delta_prefill(
    rows: Tensor,  # [T, channels + values (V + 2)], of which the channels are convolved
    bounds: Tensor,  # int32 [sequences + 1], ascending from 0 to T
    slots: Tensor,  # int [sequences]: each sequence's row of the states
    resumes: Tensor,  # bool [sequences]: whether it continues from there, else from zeros
    states: Tensor,  # float32 [slots, values, K, V], contiguous, written in place
    heads: DeltaHeads,
    gates: DeltaGates,
    *,
    pdl: bool = False,
) -> Tensor:
    """[T, values, V] in the type of `rows`, before the gated norm. Metadata is trusted."""
    tokens, sequences = rows.shape[0], resumes.shape[0]
    units = rows.new_empty(tokens, 2 * heads.keys, heads.key_dim)
    w = rows.new_empty(tokens, heads.values, heads.key_dim)
    u = rows.new_empty(tokens, heads.values, heads.value_dim)
    p = rows.new_empty(tokens, heads.values, CHUNK)
    total = rows.new_empty(tokens, heads.values, dtype=torch.float32)
    out = torch.empty_like(u)
    pdl = pdl and not interpreting()
    sizes = heads.keys, heads.values, heads.key_dim, heads.value_dim
    block_k, block_v = (max(16, triton.next_power_of_2(size)) for size in sizes[2:])
    chunks = min(tokens, triton.cdiv(tokens, CHUNK) + sequences - 1)
    exact = rows.dtype == torch.float32
    chunk_kernel[(chunks, heads.values)](
        rows, bounds, gates.log_decay, gates.dt_bias, units, w, u, p, total, sequences, rows.stride(0),
        heads.key_dim**-0.5, *sizes, block_k, block_v, CHUNK, max(2, triton.next_power_of_2(sequences)), exact,
        PDL=pdl, launch_pdl=pdl, num_warps=chunk_warps(block_k, block_v), num_stages=1,
    )  # fmt: skip
    columns = min(block_v, COLUMNS)
    walk_kernel[(triton.cdiv(heads.value_dim, columns), sequences * heads.values)](
        units, w, u, p, total, bounds, slots, resumes, states, out, states.stride(0), *sizes, block_k, columns, CHUNK,
        PDL=pdl, launch_pdl=pdl, num_warps=WALK_WARPS, num_stages=WALK_STAGES,
    )  # fmt: skip
    return out
