"""The gather before the language-model head, in plain PyTorch."""

import torch

from shardwise.ops.registry import operator


def _gather(hidden_states, logits_gather_indices, logits_gather_info_host):
    # The true length is data; the fake keeps the upper bound, which graphs are captured with.
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@operator(fake=_gather)
def gather_logits_before_lm_head(
    hidden_states: torch.Tensor, logits_gather_indices: torch.Tensor, logits_gather_info_host: torch.Tensor
) -> torch.Tensor:
    """The rows whose logits are wanted.

    hidden_states [B, 1, H] or [1, T, H]; logits_gather_indices int [>= n]; logits_gather_info_host int32 [2] on the
    host: (n, whether to gather at all). Returns [n, 1, H] or [1, n, H], or a contiguous copy when nothing is gathered.
    """
    if hidden_states.dim() != 3 or 1 not in hidden_states.shape[:2]:
        raise ValueError(
            "gather_logits_before_lm_head: hidden_states must be [B, 1, H] or [1, T, H], "
            f"got {tuple(hidden_states.shape)}"
        )
    count, required = logits_gather_info_host.tolist()
    if not required:
        return hidden_states.clone(memory_format=torch.contiguous_format)
    if count > logits_gather_indices.numel():
        raise ValueError(
            f"gather_logits_before_lm_head: {count} rows are asked for, "
            f"logits_gather_indices holds {logits_gather_indices.numel()}"
        )
    token_dim = 0 if hidden_states.shape[1] == 1 else 1
    return hidden_states.index_select(token_dim, logits_gather_indices[:count].to(torch.int64)).contiguous()
