"""FP8 linears at the sizes of large models, each beside the bf16 product it replaces."""

from collections.abc import Iterator
from functools import partial

import torch

from shardwise.ops.bench import cases
from shardwise.ops.bench.cases import Case
from shardwise.ops.quantization.fp8 import quantize_fp8

SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096), (2048, 2048))
"""[N, K] of large and of small products."""


def fp8_linear_cases(rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[Case]:
    """y = x W^T with e4m3 weights [N, K] and inputs quantised on the way; peers: bf16 weights, and the reference."""
    for outputs, columns in shapes:
        weight = cases.draw(outputs, columns)
        codes, scale = quantize_fp8(weight)
        s_in = torch.tensor(5 / 448, device=cases.DEVICE)
        for count in rows:
            x = cases.draw(count, columns)
            args = (x, codes, None, s_in, scale)
            yield Case(
                "trtllm_quant_fp8_linear",
                f"{count} x {columns} -> {outputs}",
                codes.numel() + 2 * count * (columns + outputs),
                args,
                {
                    "torch bf16": partial(torch.nn.functional.linear, x, weight),
                    "torch_quant_fp8_linear": partial(cases.OPS.torch_quant_fp8_linear, *args),
                },
            )
