"""The categories that `shardwise bench ops` measures."""

from collections.abc import Callable, Iterator

from shardwise.ops.bench.cases import Case, normalization_cases, rope_cases
from shardwise.ops.bench.quantized import fp8_linear_cases
from shardwise.ops.bench.states import fla_cases, mamba_cases

CATEGORIES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "normalization": normalization_cases,
    "rope": lambda full: rope_cases((1, 64, 1024, 8192, 16384) if full else (1, 8192)),
    "mamba": mamba_cases,
    "fla": fla_cases,
    "quantization": lambda full: fp8_linear_cases((1, 16, 64, 1024, 4096, 8192) if full else (1, 4096)),
}
