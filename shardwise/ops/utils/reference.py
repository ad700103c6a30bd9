"""Gathers around the model in plain PyTorch: before the language-model head, and of tokens from a step to the next."""

import torch

from shardwise.ops.attention.batch import read_counts
from shardwise.ops.registry import operator


def _gather(hidden_states, indices, info_host):
    # The true length is data; the fake keeps the upper bound, which graphs are captured with.
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@operator(fake=_gather)
def gather_logits_before_lm_head(
    hidden_states: torch.Tensor, logits_gather_indices: torch.Tensor, logits_gather_info_host: torch.Tensor
) -> torch.Tensor:
    """The rows whose logits are wanted.

    hidden_states [B, 1, H] or [1, T, H]; logits_gather_indices int32 or int64 [>= n]; logits_gather_info_host int [2]
    on the host: (n, whether to gather at all). Returns [n, 1, H] or [1, n, H], or a contiguous copy when nothing is
    gathered.
    """
    names = "gather_logits_before_lm_head", "logits_gather_indices"
    if logits_gather_info_host.shape != (2,):
        came = tuple(logits_gather_info_host.shape)
        raise ValueError(f"{names[0]}: logits_gather_info_host must be [2], got {came}")
    count, required = logits_gather_info_host.tolist()
    return _rows(*names, hidden_states, logits_gather_indices, count if required else None)


@operator(fake=_gather)
def gather_tokens(
    hidden_states: torch.Tensor, token_gather_indices: torch.Tensor, batch_info_host: torch.Tensor
) -> torch.Tensor:
    """The rows whose logits are wanted, counted by the batch: the later form of `gather_logits_before_lm_head`.

    hidden_states [B, 1, H] or [1, T, H]; token_gather_indices int32 or int64 [>= n]; batch_info_host int on the host, 3
    numbers or 6 and more as for the cached operators. n counts one row of every prefill and decode sequence and every
    row of the extend sequences. Returns [n, 1, H] or [1, n, H], or a contiguous copy where these are all rows.
    """
    counts = read_counts("gather_tokens", batch_info_host)
    count = counts.prefill + counts.extend_tokens + counts.decode
    rows = hidden_states.shape[:2].numel()
    return _rows("gather_tokens", "token_gather_indices", hidden_states, token_gather_indices,
                 None if count == rows else count)  # fmt: skip


def _rows(op: str, name: str, hidden_states: torch.Tensor, indices: torch.Tensor, count: int | None) -> torch.Tensor:
    if hidden_states.dim() != 3 or 1 not in hidden_states.shape[:2]:
        raise ValueError(f"{op}: hidden_states must be [B, 1, H] or [1, T, H], got {tuple(hidden_states.shape)}")
    if count is None:
        return hidden_states.clone(memory_format=torch.contiguous_format)
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} must be int32 or int64 [n or more], got {indices.dtype} {list(indices.shape)}")
    if not 0 <= count <= indices.numel():
        raise ValueError(f"{op}: {count} rows are asked for, {name} holds {indices.numel()}")
    token_dim = 0 if hidden_states.shape[1] == 1 else 1
    rows = hidden_states.shape[token_dim]
    if count and not indices.is_cuda:
        lowest, highest = (int(bound) for bound in indices[:count].aminmax())
        if lowest < 0 or highest >= rows:
            raise ValueError(f"{op}: {name} reaches from {lowest} to {highest}; legal: 0 to {rows - 1}")
    return hidden_states.index_select(token_dim, indices[:count].to(torch.int64)).contiguous()


def nothing(ungathered_input, gather_ids, mask_indices, out):
    """Fake of the operators that write `out`."""
    return None


def check_pairs(op: str, gather_ids: torch.Tensor, mask_indices: torch.Tensor, out: torch.Tensor) -> None:
    """Rules of the gather and scatter; raises ValueError and TypeError."""
    for name, index in (("gather_ids", gather_ids), ("mask_indices", mask_indices)):
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, got {index.dtype}")
    if gather_ids.numel() > mask_indices.numel():
        raise ValueError(
            f"{op}: {gather_ids.numel()} gather_ids but {mask_indices.numel()} mask_indices; legal: no fewer"
        )
    if not out.is_contiguous():
        raise ValueError(f"{op}: out is written in place and must be contiguous, got strides {out.stride()}")


@operator(fake=nothing, mutates=("out",))
def torch_utils_fused_gather_scatter(
    ungathered_input: torch.Tensor, gather_ids: torch.Tensor, mask_indices: torch.Tensor, out: torch.Tensor
) -> None:
    """out.view(-1)[mask_indices[i]] = ungathered_input.view(-1)[gather_ids[i]], in place.

    gather_ids, mask_indices: int32 or int64; entries of mask_indices behind the last of gather_ids are not read. Pairs
    with an index out of range are skipped.
    """
    check_pairs("torch_utils_fused_gather_scatter", gather_ids, mask_indices, out)
    source, target = ungathered_input.reshape(-1), out.view(-1)
    gather, scatter = gather_ids.reshape(-1).long(), mask_indices.reshape(-1)[: gather_ids.numel()].long()
    valid = (gather >= 0) & (gather < len(source)) & (scatter >= 0) & (scatter < len(target))
    target[scatter[valid]] = source[gather[valid]].to(out.dtype)
