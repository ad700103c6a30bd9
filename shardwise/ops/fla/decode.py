"""One decode step of gated delta layers, from the convolved projection to the gated norm, in one kernel.

Not a registered operator: the runtime's decode steps call it directly. A program has a whole head of one sequence: it
norms the head's query and key, finds its decay and beta, steps the state in the cache, and norms and gates the result.
Nothing waits for the device, so that a CUDA graph can hold it. With programmatic dependent launch states and slots are
read while the kernel before still runs.
"""

from dataclasses import dataclass

from torch import Tensor

from shardwise.ops.fla.rule_kernels import add_both, stepped, token_gates
from shardwise.ops.triton_support import await_predecessor, interpreting, tl, triton

_WARP_ELEMENTS = 4096
"""Of a state, for each warp of a program: 128 registers a thread. Four warps for 128 x 128 took 101 µs on an H100 where
eight took 132 and a copy 97 (64 sequences of 32 heads): fewer wait for each other, and two programs share a
multiprocessor."""


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of a layer on one rank: `values` of V elements, which share `keys` key heads of K elements evenly."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Of the convolution, [queries | keys | values]."""
        return 2 * self.keys * self.key_dim + self.values * self.value_dim


@dataclass(frozen=True)
class DeltaGates:
    """What a layer's gates and norm are made of.

    log_decay  float32 [values], -exp(A_log): the logarithm of a step's decay is this times a softplus
    dt_bias    float32 [values], in that softplus
    norm       [V], of each head by itself
    """

    log_decay: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


@triton.jit
def delta_decode_kernel(
    rows_ptr,  # [B, ...]: [queries | keys | values | output gates | beta | decay]
    slot_ptr,  # int [B]
    cache_ptr,  # float32 [slots, VALUES, K, V]
    decay_ptr,
    bias_ptr,
    norm_ptr,
    out_ptr,  # [B, VALUES V]
    row_stride,
    cache_slot,
    scale,
    eps,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """One value head of one sequence."""
    number, head = tl.program_id(0) // VALUES, tl.program_id(0) % VALUES
    i, j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    slot = tl.load(slot_ptr + number).to(tl.int64)
    tile = (i < K)[:, None] & (j < V)[None, :] & (slot >= 0)
    cached = cache_ptr + slot * cache_slot + head * K * V + i[:, None] * V + j[None, :]
    state = tl.load(cached, mask=tile, other=0.0)
    norm = tl.load(norm_ptr + j, mask=j < V, other=0.0).to(tl.float32)
    await_predecessor(PDL)
    row = rows_ptr + number.to(tl.int64) * row_stride
    key = row + head // (VALUES // KEYS) * K + i
    q = tl.load(key, mask=i < K, other=0.0).to(tl.float32)
    k = tl.load(key + KEYS * K, mask=i < K, other=0.0).to(tl.float32)
    value = row + 2 * KEYS * K + head * V + j
    v = tl.load(value, mask=j < V, other=0.0).to(tl.float32)
    gate = tl.load(value + VALUES * V, mask=j < V, other=0.0).to(tl.float32)
    beta, decay = token_gates(row + 2 * KEYS * K + 2 * VALUES * V, decay_ptr, bias_ptr, head, True, VALUES)
    q_squared, k_squared = tl.reduce((q * q, k * k), 0, add_both)
    q *= scale * tl.rsqrt(q_squared + 1e-6)
    k *= tl.rsqrt(k_squared + 1e-6)
    state, out = stepped(state * tl.exp(decay), q, k, v, beta)
    tl.store(cached, state, mask=tile)
    normed = out * tl.rsqrt(tl.sum(out * out, axis=0) / V + eps) * norm * gate * tl.sigmoid(gate)
    target = out_ptr + number.to(tl.int64) * VALUES * V + head * V + j
    tl.store(target, tl.where(slot >= 0, normed, 0.0).to(out_ptr.dtype.element_ty), mask=j < V)


def warps_for(block_k: int, block_v: int) -> int:
    """Of a program that has a state of so many elements."""
    return min(8, max(1, block_k * block_v // _WARP_ELEMENTS))


def delta_decode(
    rows: Tensor,  # [B, channels + values (V + 2)], of which the channels are convolved
    slots: Tensor,  # int [B]: each sequence's row of the states; negative marks a padding row, which yields zeros
    states: Tensor,  # float32 [slots, values, K, V], contiguous, stepped in place
    heads: DeltaHeads,
    gates: DeltaGates,
    *,
    pdl: bool = False,
) -> Tensor:
    """One token of each sequence: [B, values V] in the type of `rows`, normed and gated. No two may share a slot.

    pdl  what wrote `slots` and `states` must have ended before the kernel in front of this one began
    """
    expected = (states.shape[0], heads.values, heads.key_dim, heads.value_dim)
    width = heads.channels + heads.values * (heads.value_dim + 2)
    if states.shape != expected or not states.is_contiguous() or rows.shape[1:] != (width,) or rows.stride(1) != 1:
        raise ValueError(
            f"delta_decode: rows must be [B, {width}] with contiguous rows and states contiguous {expected} for "
            f"{heads}, got {tuple(rows.shape)} with strides {rows.stride()} and {tuple(states.shape)}"
        )
    out = rows.new_empty(rows.shape[0], heads.values * heads.value_dim)
    block_k, block_v = triton.next_power_of_2(heads.key_dim), triton.next_power_of_2(heads.value_dim)
    pdl = pdl and not interpreting()
    delta_decode_kernel[(rows.shape[0] * heads.values,)](
        rows, slots, states, gates.log_decay, gates.dt_bias, gates.norm, out, rows.stride(0),
        states.stride(0), heads.key_dim**-0.5, gates.eps, heads.keys, heads.values, heads.key_dim, heads.value_dim,
        block_k, block_v, PDL=pdl, launch_pdl=pdl, num_warps=warps_for(block_k, block_v),
    )  # fmt: skip
    return out
