"""Mixture of experts in plain PyTorch, on CPU and CUDA: a loop over the experts that have tokens."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.moe.contract import (
    as_tokens,
    check_device,
    check_same_dtype,
    check_shapes,
    check_stacked,
    like_x,
    reference_activation,
)
from shardwise.ops.moe.exchange import run_routed
from shardwise.ops.quantization.mxfp4 import check_mxfp4, dequantize_mxfp4
from shardwise.ops.registry import operator
from shardwise.partition import extent


@operator(fake=like_x)
def torch_moe(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w1_weight: list[Tensor],
    w2_weight: list[Tensor],
    w3_weight: list[Tensor],
    is_gated_mlp: bool = True,
    act_fn: int = 4,
    mapping_config: str = "",
    max_num_tokens: int = 0,
    apply_routing_on_input: bool = False,
) -> Tensor:
    """Mixture of experts with one weight tensor an expert.

    x                 [T, H] or [B, S, H]
    selected_experts  int [T, K]; ids outside [0, E) are skipped, a token without experts gives zero
    routing_weights   [T, K], multiplied on the expert's output, or on its input with `apply_routing_on_input`
    w1_weight, w3_weight   E tensors [I, H] (gate, up), w3_weight empty when not gated; w2_weight: E tensors [H, I]
    act_fn            4 Silu, 5 Swiglu (the same), 8 Relu2
    mapping_config    JSON of the mapping; with enable_attention_dp and moe_ep_size > 1 ids are global and tokens
                      travel to their experts over the current moe_ep group (without one, torch.distributed's
                      default group), padded to max_num_tokens if given
    Returns x's shape and dtype; experts are summed in float32.
    """
    name = "torch_moe"
    act = reference_activation(name, act_fn)
    check_lists(name, x, is_gated_mlp, w1_weight, w2_weight, w3_weight)

    def mlp(expert: int, rows: Tensor) -> Tensor:
        rows = rows.to(w1_weight[expert].dtype)
        hidden = act(F.linear(rows, w1_weight[expert]))
        if is_gated_mlp:
            hidden = hidden * F.linear(rows, w3_weight[expert])
        return F.linear(hidden, w2_weight[expert])

    return run_experts(
        name, x, selected_experts, routing_weights, len(w1_weight), mlp, mapping_config, max_num_tokens,
        apply_routing_on_input,
    )  # fmt: skip


def check_lists(name: str, x: Tensor, gated: bool, w1: list, w2: list, w3: list, packed: int = 1) -> None:
    """Errors unless the lists are equally long, w3 empty when there is no gate, and their weights fit one another: w1
    and w3 [I, H/packed], w2 [H, I/packed], of one dtype."""
    if len(w1) != len(w2) or len(w3) != (len(w1) if gated else 0):
        raise ValueError(
            f"{name}: is_gated_mlp={gated} needs equally long w1_weight and w2_weight and "
            f"{'as many' if gated else 'no'} w3_weight, got {len(w1)}, {len(w2)} and {len(w3)}"
        )
    hidden = x.shape[-1]
    for expert, weight in enumerate(w1):
        size, dtype = w1[0].shape[0], w1[0].dtype
        inner, outer = (size, hidden // packed), (hidden, size // packed)
        given = (weight, inner), (w2[expert], outer), *[(up, inner) for up in w3[expert : expert + 1]]
        if all([other.shape == shape and other.dtype == dtype for other, shape in given]):
            continue
        wanted = {f"w{number}_weight[{expert}]": one for number, one in enumerate(given, 1)}
        check_shapes(name, f"H = {hidden}, I = {size} rows of w1_weight[0]", **wanted)
        kinds = ", ".join(f"{label} {other.dtype}" for label, (other, _) in wanted.items())
        raise TypeError(f"{name}: weights must have the dtype of w1_weight[0], {dtype}, got {kinds}")


def run_experts(
    name: str,
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    experts: int,
    mlp: Callable[[int, Tensor], Tensor],
    mapping_config: str,
    max_num_tokens: int,
    apply_routing_on_input: bool,
) -> Tensor:
    """Routed sum over `experts` local experts, `mlp(expert, rows)` each; exchanges tokens if the mapping says so."""

    def compute(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return _routed_sum(rows, ids, weights, experts, mlp, apply_routing_on_input)

    return run_routed(name, x, selected_experts, routing_weights, experts, compute, mapping_config, max_num_tokens)


def _routed_sum(x, ids, weights, experts, mlp, on_input) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    chosen, order = ids.flatten().sort(stable=True)  # an expert's tokens follow one another, ascending
    bounds = torch.searchsorted(chosen, torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)).tolist()
    tokens, factors = order // ids.shape[1], weights.flatten()[order].float()[:, None]
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        token, weight = tokens[first:last], factors[first:last]
        rows = (x[token] * weight).to(x.dtype) if on_input else x[token]
        value = mlp(expert, rows).float()
        out.index_add_(0, token, value if on_input else value * weight)
    return out.to(x.dtype)


@operator(fake=like_x)
def torch_moe_fused(
    x: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    w3_w1_stacked_weight: Tensor,
    w2_stacked_weight: Tensor,
) -> Tensor:
    """Gated SiLU mixture of experts with stacked weights.

    x [T, H] or [B, S, H]; selected_experts int [T, K], ids outside [0, E) skipped; routing_weights [T, K];
    w3_w1_stacked_weight [E, 2I, H]: I rows of w3 (up), then I rows of w1 (gate); w2_stacked_weight [E, H, I].
    Returns x's shape and dtype.
    """
    name = "torch_moe_fused"
    experts, size = check_stacked(name, x, w3_w1_stacked_weight, w2_stacked_weight, gated=True)
    if w3_w1_stacked_weight.dtype != w2_stacked_weight.dtype:
        kinds = f"{w3_w1_stacked_weight.dtype} and {w2_stacked_weight.dtype}"
        raise TypeError(f"{name}: both weights must have one dtype, got {kinds}")

    def mlp(expert: int, rows: Tensor) -> Tensor:
        up, gate = F.linear(rows.to(w2_stacked_weight.dtype), w3_w1_stacked_weight[expert]).split(size, dim=-1)
        return F.linear(F.silu(gate) * up, w2_stacked_weight[expert])

    return run_experts(name, x, selected_experts, routing_weights, experts, mlp, "", 0, False)


def swiglu_clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss: gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit`, up within +-`limit`."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


@operator(fake=like_x)
def torch_moe_dense_mlp(
    hidden_states: Tensor,
    routing_weights: Tensor,
    gate_up_w: Tensor,
    gate_up_b: Tensor,
    down_w: Tensor,
    down_b: Tensor,
    alpha: float = 1.0,
    limit: float = 10.0,
) -> Tensor:
    """gpt-oss experts, all of them for all tokens, weighted with the dense routing.

    hidden_states [B, S, H] or [T, H]; routing_weights [T, E], zeros where an expert is not selected;
    gate_up_w [E, H, 2I] (columns: gate even, up odd), gate_up_b [E, 2I], down_w [E, I, H], down_b [E, H].
    Returns hidden_states' shape and dtype: sum over e of routing * ((up + 1) gate sigmoid(alpha gate) down + bias).
    """
    name = "torch_moe_dense_mlp"
    tokens = as_tokens(name, "hidden_states", hidden_states)
    check_same_dtype(name, tokens, gate_up_w, gate_up_b, down_w, down_b)
    if gate_up_w.dim() != 3:
        raise ValueError(f"{name}: gate_up_w must be [E, H, 2I], got {list(gate_up_w.shape)}")
    experts, size, hidden = gate_up_w.shape[0], gate_up_w.shape[2] // 2, tokens.shape[1]
    if routing_weights.shape != (tokens.shape[0], experts):
        raise ValueError(
            f"{name}: routing_weights must be dense [T, E] = [{tokens.shape[0]}, {experts}], "
            f"got {tuple(routing_weights.shape)}"
        )
    check_shapes(
        name,
        f"hidden size {hidden}, {experts} experts, intermediate size {size}",
        gate_up_w=(gate_up_w, (experts, hidden, 2 * size)),
        gate_up_b=(gate_up_b, (experts, 2 * size)),
        down_w=(down_w, (experts, size, hidden)),
        down_b=(down_b, (experts, hidden)),
    )
    out = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    for expert in range(experts):
        gate_up = tokens @ gate_up_w[expert] + gate_up_b[expert]
        value = swiglu_clamped(gate_up[:, 0::2], gate_up[:, 1::2], alpha, limit) @ down_w[expert] + down_b[expert]
        out += value.float() * routing_weights[:, expert, None].float()
    return out.to(hidden_states.dtype).view(hidden_states.shape)


def mxfp4_moe_reference(
    hidden_states: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    top_k: int,
    gate_up_blocks: Tensor,
    gate_up_bias: Tensor,
    gate_up_scales: Tensor,
    alpha: float,
    limit: float,
    down_blocks: Tensor,
    down_bias: Tensor,
    down_scales: Tensor,
    ep_size: int = 1,
    ep_rank: int = 0,
) -> Tensor:
    """`triton_mxfp4_moe_ep` in plain PyTorch, on any device: only experts with tokens are dequantised.

    Arguments as there; products in hidden_states' dtype, biases and the sum over experts in float32.
    """
    check_mxfp4_moe(
        "mxfp4_moe_reference", hidden_states, router_weight, router_bias, top_k, gate_up_blocks, gate_up_bias,
        gate_up_scales, down_blocks, down_bias, down_scales, ep_size, ep_rank,
    )  # fmt: skip
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids, weights = route(tokens, router_weight, router_bias, top_k)
    start, stop = extent(router_weight.shape[0], ep_size, ep_rank)

    def mlp(expert: int, rows: Tensor) -> Tensor:
        first = dequantize_mxfp4(gate_up_blocks[expert], gate_up_scales[expert], rows.dtype)
        gate_up = F.linear(rows, first).float() + gate_up_bias[expert].float()
        hidden = swiglu_clamped(gate_up[:, 0::2], gate_up[:, 1::2], alpha, limit).to(rows.dtype)
        second = dequantize_mxfp4(down_blocks[expert], down_scales[expert], rows.dtype)
        return F.linear(hidden, second).float() + down_bias[expert].float()

    return _routed_sum(tokens, ids - start, weights, stop - start, mlp, False).view(hidden_states.shape)


def route(tokens: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [T, K], weights float32 [T, K]): top-k of the logits, softmax over the k selected."""
    logits = F.linear(tokens, weight.to(tokens.dtype), bias.to(tokens.dtype)).float()
    values, ids = logits.topk(top_k, dim=-1)
    return ids, values.softmax(dim=-1)


def check_mxfp4_moe(
    name, hidden_states, router_weight, router_bias, top_k, gate_up_blocks, gate_up_bias, gate_up_scales, down_blocks,
    down_bias, down_scales, ep_size, ep_rank,
) -> None:  # fmt: skip
    """TypeError or ValueError naming the argument that does not fit the gpt-oss layout."""
    as_tokens(name, "hidden_states", hidden_states)
    check_device(
        name, hidden_states, router_weight=router_weight, router_bias=router_bias, gate_up_blocks=gate_up_blocks,
        gate_up_bias=gate_up_bias, gate_up_scales=gate_up_scales, down_blocks=down_blocks, down_bias=down_bias,
        down_scales=down_scales,
    )  # fmt: skip
    if router_weight.dim() != 2:
        raise ValueError(f"{name}: router_weight must be [E, H], got {list(router_weight.shape)}")
    hidden, total = hidden_states.shape[-1], router_weight.shape[0]
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"{name}: ep_rank={ep_rank} with ep_size={ep_size}; legal: 0 <= ep_rank < ep_size")
    start, stop = extent(total, ep_size, ep_rank)
    check_mxfp4(f"{name}, gate_up", gate_up_blocks, gate_up_scales)
    check_mxfp4(f"{name}, down", down_blocks, down_scales)
    local, size = stop - start, gate_up_blocks.shape[1] // 2
    check_shapes(
        name,
        f"hidden size {hidden}, {local} of {total} experts on rank {ep_rank} of {ep_size}",
        router_weight=(router_weight, (total, hidden)),
        router_bias=(router_bias, (total,)),
        gate_up_blocks=(gate_up_blocks, (local, 2 * size, hidden // 32, 16)),
        gate_up_bias=(gate_up_bias, (local, 2 * size)),
        down_blocks=(down_blocks, (local, hidden, size // 32, 16)),
        down_bias=(down_bias, (local, hidden)),
    )
    if hidden % 32 or size % 32:
        raise ValueError(f"{name}: hidden size {hidden} and intermediate size {size} must be multiples of 32")
    if not 1 <= top_k <= total:
        raise ValueError(f"{name}: top_k={top_k} of {total} experts; legal: 1 to the number of experts")
