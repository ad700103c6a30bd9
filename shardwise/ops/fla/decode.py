"""One decode step of gated delta layers, from the convolved projection to the gated norm, in one kernel.

Not a registered operator: the runtime's decode steps call it directly. A program has a whole head of one sequence: it
norms the head's query and key, finds its decay and beta, steps the state in the cache, and norms and gates the result.
Nothing waits for the device, so that a CUDA graph can hold it.
"""

from dataclasses import dataclass

from torch import Tensor

from shardwise.ops.triton_support import await_predecessor, interpreting, tl, triton

_WARP_ELEMENTS = 2048
"""Of a state, for each warp of a program: 64 registers a thread."""


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
def unit(x):
    """x [K] at length 1; zero stays zero."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


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
    """As `fla/kernels.py` steps a state: with u the update, S'^T q = S^T q + (k . q) u, so that S is passed once."""
    await_predecessor(PDL)
    number, head = tl.program_id(0) // VALUES, tl.program_id(0) % VALUES
    i, j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    target = out_ptr + number.to(tl.int64) * VALUES * V + head * V + j
    slot = tl.load(slot_ptr + number).to(tl.int64)
    if slot < 0:
        tl.store(target, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=j < V)
        return
    tile = (i < K)[:, None] & (j < V)[None, :]
    cached = cache_ptr + slot * cache_slot + head * K * V + i[:, None] * V + j[None, :]
    state = tl.load(cached, mask=tile, other=0.0)
    row = rows_ptr + number.to(tl.int64) * row_stride
    key = row + head // (VALUES // KEYS) * K + i
    q = scale * unit(tl.load(key, mask=i < K, other=0.0).to(tl.float32))
    k = unit(tl.load(key + KEYS * K, mask=i < K, other=0.0).to(tl.float32))
    value = row + 2 * KEYS * K + head * V + j
    v = tl.load(value, mask=j < V, other=0.0).to(tl.float32)
    gate = tl.load(value + VALUES * V, mask=j < V, other=0.0).to(tl.float32)
    numbers = row + 2 * KEYS * K + 2 * VALUES * V + head
    beta = tl.sigmoid(tl.load(numbers).to(tl.float32))
    step = softplus(tl.load(numbers + VALUES).to(tl.float32) + tl.load(bias_ptr + head))
    state *= tl.exp(tl.load(decay_ptr + head) * step)
    update = beta * (v - tl.sum(state * k[:, None], axis=0))
    out = tl.sum(state * q[:, None], axis=0) + tl.sum(q * k, axis=0) * update
    tl.store(cached, state + k[:, None] * update[None, :], mask=tile)
    normed = out * tl.rsqrt(tl.sum(out * out, axis=0) / V + eps)
    normed *= tl.load(norm_ptr + j, mask=j < V, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    tl.store(target, normed.to(out_ptr.dtype.element_ty), mask=j < V)


def delta_decode(
    rows: Tensor,  # [B, channels + values (V + 2)], of which the channels are convolved
    slots: Tensor,  # int [B]: each sequence's row of the states; negative marks a padding row, which yields zeros
    states: Tensor,  # float32 [slots, values, K, V], contiguous, stepped in place
    heads: DeltaHeads,
    gates: DeltaGates,
    *,
    pdl: bool = False,
) -> Tensor:
    """One token of each sequence: [B, values V] in the type of `rows`, normed and gated. No two may share a slot."""
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
        block_k, block_v, PDL=pdl, launch_pdl=pdl, num_warps=min(8, max(1, block_k * block_v // _WARP_ELEMENTS)),
    )  # fmt: skip
    return out
