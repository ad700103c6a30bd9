"""Shape rules of the SSM operators."""

from torch import Tensor

from shardwise.ops.attention.batch import Batch


def check_ssm(
    op: str, hidden_states: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt: Tensor, dt_bias: Tensor,
    time_step_limit: list[float], chunk_size: int, cache: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError when a shape contradicts hidden_states [b, s, H, P] and B [b, s, G, N]."""
    if hidden_states.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"{op}: hidden_states must be [b, s, H, P] and B [b, s, G, N], got {tuple(hidden_states.shape)} "
            f"and {tuple(B.shape)}"
        )
    # Whole shapes are compared: slices of them cost several times as much.
    (b, s, heads, size), (_, _, groups, states) = hidden_states.shape, B.shape
    each_head, each_group = (heads,), (b, s, groups, states)
    if (
        B.shape == each_group
        and C.shape == each_group
        and dt.shape == (b, s, heads)
        and A.shape == D.shape == dt_bias.shape == each_head
        and (cache is None or cache.shape == (cache.shape[0], heads, size, states))
        and groups >= 1
        and heads % groups == 0
        and len(time_step_limit) == 2
        and time_step_limit[0] <= time_step_limit[1]
        and chunk_size >= 1
    ):
        return
    raise ValueError(f"{op}: {_complaint(hidden_states, A, B, C, D, dt, dt_bias, time_step_limit, chunk_size, cache)}")


def check_pieces(op: str, batch: Batch, bounds: Tensor, index: Tensor, offset: Tensor, owner: Tensor) -> None:
    """Raises ValueError when metadata of prefill sequences is too short for these; what it holds is not looked at."""
    for name, tensor, least in (
        ("cu_seqlen", bounds, batch.prefill + 1),
        ("chunk_offsets", offset, index.numel()),
        ("seq_idx_prefill", owner, batch.prefill_tokens),
    ):
        if tensor.numel() < least:
            raise ValueError(
                f"{op}: {name} has {tensor.numel()} entries; {batch.prefill} sequences, {batch.prefill_tokens} tokens "
                f"and {index.numel()} pieces need {least}"
            )


def _complaint(hidden_states, A, B, C, D, dt, dt_bias, time_step_limit, chunk_size, cache) -> str:
    (b, s, heads, size), (groups, states) = hidden_states.shape, B.shape[2:]
    wanted = {"B": (B, (b, s, groups, states)), "C": (C, (b, s, groups, states)), "dt": (dt, (b, s, heads))}
    wanted |= {"A": (A, (heads,)), "D": (D, (heads,)), "dt_bias": (dt_bias, (heads,))}
    if cache is not None:
        wanted["ssm_state_cache"] = (cache, (cache.shape[0], heads, size, states))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            return f"{name} must be {shape} for these inputs, got {tuple(tensor.shape)}"
    if groups < 1 or heads % groups:
        return f"the number of groups {groups} must divide the number of heads {heads}"
    if len(time_step_limit) != 2 or time_step_limit[0] > time_step_limit[1]:
        return f"time_step_limit must be [lowest, highest], got {list(time_step_limit)}"
    return f"chunk_size must be positive, got {chunk_size}"
