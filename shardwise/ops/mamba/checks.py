"""Shape rules of the SSM operators."""

from torch import Tensor


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
    b, s, heads, size = hidden_states.shape
    groups, states = B.shape[2:]
    wanted = {"B": (B, (b, s, groups, states)), "C": (C, (b, s, groups, states)), "dt": (dt, (b, s, heads))}
    wanted |= {"A": (A, (heads,)), "D": (D, (heads,)), "dt_bias": (dt_bias, (heads,))}
    if cache is not None:
        wanted["ssm_state_cache"] = (cache, (cache.shape[0], heads, size, states))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape} for these inputs, got {tuple(tensor.shape)}")
    if groups < 1 or heads % groups:
        raise ValueError(f"{op}: the number of groups {groups} must divide the number of heads {heads}")
    if len(time_step_limit) != 2 or time_step_limit[0] > time_step_limit[1]:
        raise ValueError(f"{op}: time_step_limit must be [lowest, highest], got {list(time_step_limit)}")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be positive, got {chunk_size}")
