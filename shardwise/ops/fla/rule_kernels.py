"""What the delta rule's Triton kernels share: a token's gates, and its step of a state."""

from shardwise.ops.triton_support import tl, triton


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def token_gates(number_ptr, decay_ptr, bias_ptr, head, live, VALUES: tl.constexpr):
    """Beta and the logarithm of the decay of one head's tokens, which number_ptr points to: [.. beta | decay] of all.

    decay_ptr, bias_ptr   as `DeltaGates`
    """
    beta = tl.sigmoid(tl.load(number_ptr + head, mask=live, other=0.0).to(tl.float32))
    raw = tl.load(number_ptr + VALUES + head, mask=live, other=0.0).to(tl.float32)
    return beta, tl.load(decay_ptr + head) * softplus(raw + tl.load(bias_ptr + head))


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def stepped(state, q, k, v, beta):
    """A state [K, V], which has faded already, after one token; and what it then holds for q, [V].

    What it held for k and for q is summed in one pass, after which warps wait for each other once: with u the update,
    S'^T q = S^T q + (k . q) u.
    """
    held_k, held_q = tl.reduce((state * k[:, None], state * q[:, None]), 0, add_both)
    update = beta * (v - held_k)
    out = held_q + tl.sum(q * k, axis=0) * update
    return state + k[:, None] * update[None, :], out
