"""Tokens to their experts and back, for attention data parallelism: every rank has its own tokens, ids are global.

Without `max_num_tokens` each row travels once to every rank that holds one of its experts (ragged all-to-all; row
counts pass through the host). With it, all ranks gather `max_num_tokens` padded rows, compute, and scatter the
sums: fixed sizes, no host synchronisation, so it can stand in a CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shardwise.comm.base import Communicator
from shardwise.comm.rank import current_groups
from shardwise.comm.strategy import default_group
from shardwise.ops.moe.contract import ExpertMapping, check_routing, parse_mapping
from shardwise.partition import extent

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, H], local ids [T, K], weights [T, K]) to [T, H]; ids outside the local experts are skipped."""


def run_routed(
    name: str,
    x: Tensor,  # [T, H] or [B, S, H]
    selected_experts: Tensor,
    routing_weights: Tensor,
    local_experts: int,
    compute: Compute,
    mapping_config: str,
    max_num_tokens: int,
) -> Tensor:
    """`compute` on checked [T, H] tokens, with or without a token exchange; x's shape."""
    tokens = check_routing(name, x, selected_experts, routing_weights).contiguous()
    mapping = parse_mapping(mapping_config)
    if mapping.exchanges_tokens:
        out = exchange_tokens(
            name, mapping, max_num_tokens, local_experts, tokens, selected_experts, routing_weights, compute
        )
    else:
        out = compute(tokens, selected_experts, routing_weights)
    return out.view(x.shape)


def exchange_tokens(
    name: str,
    mapping: ExpertMapping,
    max_num_tokens: int,
    local_experts: int,
    x: Tensor,  # [T, H]
    ids: Tensor,  # [T, K], global
    weights: Tensor,  # [T, K]
    compute: Compute,
) -> Tensor:
    """Sum over all ranks' experts for this rank's tokens, [T, H] in x's dtype. A collective of the moe_ep group."""
    group = _group(name, mapping, x.device.type)
    start, _ = mapping.local_range(local_experts, group.rank)
    total = mapping.num_experts or local_experts * group.size
    if max_num_tokens:
        return _gather_and_scatter(name, group, max_num_tokens, start, x, ids, weights, compute)
    parts = [extent(total, group.size, rank) for rank in range(group.size)]
    wanted = torch.stack([((ids >= first) & (ids < last)).any(dim=1) for first, last in parts])
    return dispatch_and_combine(
        group, wanted, x, ids, weights, lambda there, chosen, factors: compute(there, chosen - start, factors)
    )


def _group(name: str, mapping: ExpertMapping, device: str) -> Communicator:
    """The current moe_ep group; without one torch.distributed's default group, if it has the mapping's size."""
    groups = current_groups()
    group = groups.moe_ep if groups is not None else default_group(device)
    if group.size != mapping.moe_ep_size:
        raise ValueError(
            f"{name}: mapping_config says moe_ep_size={mapping.moe_ep_size}, but the current moe_ep group has "
            f"{group.size} ranks; run inside shardwise.comm.rank.use_groups or initialise torch.distributed"
        )
    return group


def _gather_and_scatter(name, group, limit, start, x, ids, weights, compute) -> Tensor:
    tokens = x.shape[0]
    if tokens > limit:
        raise ValueError(f"{name}: {tokens} tokens exceed max_num_tokens={limit}")
    missing = limit - tokens
    pad = torch.nn.functional.pad
    every_x = group.all_gather(pad(x, (0, 0, 0, missing)))
    every_id = group.all_gather(pad(ids, (0, 0, 0, missing), value=-1))
    every_weight = group.all_gather(pad(weights, (0, 0, 0, missing)))
    partial = compute(every_x, every_id - start, every_weight)
    return group.reduce_scatter(partial, sizes=[limit] * group.size)[:tokens]


def dispatch_and_combine(
    group: Communicator,
    wanted: Tensor,  # bool [W, T]: which tokens have experts on which rank
    x: Tensor,  # [T, H], this rank's tokens, possibly none
    ids: Tensor,  # [T, K], global
    weights: Tensor,  # [T, K]
    compute: Compute,
) -> Tensor:
    """Sum over the experts of all ranks, [T, H] in x's dtype. Three collectives of the group: counts, tokens, sums.

    `compute` gets the tokens that have experts here, their ids still global. Partial sums are added in rank order, in
    float32. The host waits twice, for which tokens go and for how many come.
    """
    order = wanted.nonzero()[:, 1]  # the first rank's tokens, rising, then the second's
    counts = wanted.sum(dim=1)
    send, receive = torch.stack([counts, group.all_to_all(counts)]).tolist()
    there = group.all_to_all(_joined([tensor[order] for tensor in (x, ids, weights)]), send, receive)
    partial = compute(*_separated(there, (x, ids, weights)))
    back = group.all_to_all(partial, receive, send)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for rows, sums in zip(order.split(send), back.split(send), strict=True):
        out[rows] += sums.float()
    return out.to(x.dtype)


def _joined(tensors: list[Tensor]) -> Tensor:
    """The rows of all tensors side by side, as bytes: they travel as one."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], dim=1)


def _separated(rows: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    """What `_joined` put together, of rows of the dtypes and widths of `like`."""
    widths = [tensor.shape[1] * tensor.element_size() for tensor in like]
    parts = rows.split(widths, dim=1)
    # Copies: a part of one row counts as contiguous, but may be misaligned for its dtype.
    whole = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [part.view(tensor.dtype) for part, tensor in zip(whole, like, strict=True)]
