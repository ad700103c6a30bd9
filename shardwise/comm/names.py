"""Names of collectives, and of strategies: which are known, and which no machine runs. Free of torch."""

from shardwise.comm.base import STRATEGIES, Unavailable

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "all_reduce_residual_rms_norm")
_MULTICAST = "needs NVLink multicast, which is never used here; use AUTO, ONESHOT or TWOSHOT"
UNUSABLE = {
    "UB": "user buffers reduce through NVLS: " + _MULTICAST,
    "MNNVL": "multi-node NVLink kernels write through multicast objects: " + _MULTICAST,
}


def require_strategy_name(strategy: str) -> None:
    """ValueError for an unknown name."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; legal: {', '.join(STRATEGIES)}")


def require_strategy(strategy: str) -> None:
    """ValueError for an unknown name; Unavailable with the reason for a strategy that needs multicast."""
    require_strategy_name(strategy)
    if strategy in UNUSABLE:
        raise Unavailable(f"strategy {strategy}: {UNUSABLE[strategy]}")
