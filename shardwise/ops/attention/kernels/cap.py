"""The soft cap of scores."""

from shardwise.ops.ptx import logistic
from shardwise.ops.triton_support import tl, triton


@triton.jit
def capped(scores, scale, CAP: tl.constexpr):
    """CAP tanh(scores * scale / CAP), with scale and CAP in units of log2: tanh(x) is 1 - 2 / (1 + exp(2 x)).

    Accurate to some 1e-7 CAP; the hardware's tanh is off by 5e-4 of its result, which a power multiplies by the score.
    """
    return CAP - 2 * CAP * logistic(scores * (scale * (2.8853900817779268 / CAP)))
