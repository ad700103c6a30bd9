"""Keys, values and queries of prompts whose latents are expanded, as ragged attention reads them.

One product expands the latents of all heads. A kernel of ours then puts the shared rotated key behind every head's
key, and rotated queries behind the others; values are read where the product has them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Kept, Kernel, Launch
from shardwise.ops.mla.absorb import Rows
from shardwise.ops.mla.checks import LatentHeads
from shardwise.ops.repeated import Repeated
from shardwise.ops.scratch import KEPT_TOKENS, Scratch, shared
from shardwise.ops.triton_support import await_predecessor, dependent_launch, tl, triton
from shardwise.plan_cache import allocator, view

HEADS = 16
"""Of a program"""


class _Room(NamedTuple):
    """Memory of a call by its parts, and the kernel that fills two of them."""

    both: Tensor
    """[T, N * (Dn + Dv)], a head's key without rotation before its value"""
    join: Repeated
    queries: Tensor
    """[T, N, Dn + Dr]"""
    keys: Tensor
    """The same"""
    values: Tensor
    """[T, N, Dv], parts of `both`"""


Expanded = Scratch[_Room]
"""The prompts' tokens of a step, but for its tensors"""
# Which takes a result to write, though PyTorch's stubs do not tell.
_linear: Callable[..., Tensor] = torch.nn.functional.linear


def expand(
    part: Expanded, latent: Tensor, rotated: Tensor, q_nope: Tensor, q_pe: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of latents [T, R], rotated keys [T, Dr] and a step's queries; they stay until the next
    call on this stream."""
    both, join, queries, keys, values = part.take()
    _linear(latent, weight.detach() if weight.requires_grad else weight, out=both)
    join((rotated, q_nope, q_pe))
    return queries, keys, values


def expanding(heads: LatentHeads, q: Rows, kpe_token: int, tokens: int, like: Tensor) -> Expanded:
    """For the first `tokens` of a step. q_nope's rows are `q`, q_pe is contiguous, all tensors are of `like`'s dtype;
    kpe_token is the stride from a rotated key to the next."""
    device, (count, nope, rope, value, _) = like.device, heads
    pdl, powers = dependent_launch(device), [triton.next_power_of_2(size) for size in (nope, rope)]
    fixed = q.token, q.head, kpe_token, nope, rope, value, *powers, HEADS, pdl
    form = _KERNEL.form_for(device, (like,), fixed, warps=4, pdl=pdl)
    launch = Launch(form, (tokens, -(-count // HEADS), 1), (count,))
    wide, joined = count * (nope + value), count * (nope + rope)
    elements = wide + 2 * joined
    if tokens <= KEPT_TOKENS:
        memory = shared(device, like.dtype, (KEPT_TOKENS * elements,)).take
    else:
        memory = allocator((tokens * elements,), like.dtype, device)

    def make() -> _Room:
        room = memory()
        both = view(room, (tokens, wide), (wide, 1))
        sizes, strides = (tokens, count, nope + rope), (joined, nope + rope, 1)
        queries, keys = (view(room, sizes, strides, tokens * first) for first in (wide, wide + joined))
        values = view(room, (tokens, count, value), (wide, nope + value, 1), nope)
        return _Room(both, Repeated(device, launch, Kept((both, queries, keys))), queries, keys, values)

    return Scratch(device, tokens, make)


@triton.jit(do_not_specialize=["heads"])
def join_kernel(
    kpe_ptr, q_nope_ptr, q_pe_ptr, both_ptr, query_ptr, key_ptr, heads, Q_TOKEN, Q_HEAD, KPE_TOKEN,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Query and key of some heads of one token: the parts without rotation and the rotated ones behind them."""
    await_predecessor(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    n, r = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_R)[None, :]
    plain, turned = (head < heads) & (n < NOPE), (head < heads) & (r < ROPE)
    row = (token * heads + head) * (NOPE + ROPE)
    key = tl.load(both_ptr + (token * heads + head) * (NOPE + VALUE) + n, mask=plain)
    query = tl.load(q_nope_ptr + token * Q_TOKEN + head * Q_HEAD + n, mask=plain)
    turned_key = tl.load(kpe_ptr + token * KPE_TOKEN + r + head * 0, mask=turned)
    turned_query = tl.load(q_pe_ptr + (token * heads + head) * ROPE + r, mask=turned)
    tl.store(key_ptr + row + n, key, mask=plain)
    tl.store(key_ptr + row + NOPE + r, turned_key, mask=turned)
    tl.store(query_ptr + row + n, query, mask=plain)
    tl.store(query_ptr + row + NOPE + r, turned_query, mask=turned)


_KERNEL = Kernel(join_kernel)
