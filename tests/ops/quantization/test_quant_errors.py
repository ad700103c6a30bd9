"""Bad arguments of the quantised linears: one sentence with operator, argument, what came and what is legal."""

import pytest
import torch

import shardwise.ops  # noqa: F401 - registers the operators

X = torch.randn(3, 32)
CODES = torch.zeros(8, 32, dtype=torch.float8_e4m3fn)
ONE = torch.ones(())
NVFP4 = torch.zeros(8, 16, dtype=torch.uint8)
SCALES = torch.zeros(512, dtype=torch.uint8)
CASES = {
    "weight_fp8 must be float8_e4m3fn": ("torch_quant_fp8_linear", TypeError, (X, X, None, ONE, ONE)),
    "with K = 32": ("torch_quant_fp8_linear", ValueError, (X, CODES[:, :16], None, ONE, ONE)),
    "input_scale must be a tensor with one element, got None": (
        "torch_quant_fp8_linear",
        ValueError,
        (X, CODES, None, None, ONE),
    ),
    r"weight_scale must be a tensor with one element, got \(2,\)": (
        "trtllm_quant_fp8_linear",
        ValueError,
        (X, CODES, None, ONE, torch.ones(2)),
    ),
    "bias must have N = 8": ("trtllm_quant_fp8_linear", ValueError, (X, CODES, torch.ones(7), ONE, ONE)),
    r"need \[B, M, K\]": ("torch_quant_fp8_bmm", ValueError, (X[None], X[None], ONE, ONE)),
    "weight_scale must have one element": (
        "torch_quant_fp8_bmm",
        ValueError,
        (X[None], X.T[None], ONE, torch.ones(2)),
    ),
    "all required": ("torch_quant_nvfp4_linear", ValueError, (X, NVFP4, None, ONE, SCALES, None)),
    "NVFP4 weight must be uint8": ("torch_quant_nvfp4_linear", TypeError, (X, X, None, ONE, SCALES, ONE)),
    "block scales must be uint8": ("torch_quant_nvfp4_linear", TypeError, (X, NVFP4, None, ONE, SCALES.float(), ONE)),
    "have 512 elements": ("torch_quant_nvfp4_linear", ValueError, (X, NVFP4, None, ONE, SCALES[:8], ONE)),
    r"must be \[N, K/2\], K = 32": ("torch_quant_nvfp4_linear", ValueError, (X, NVFP4[:, :8], None, ONE, SCALES, ONE)),
    "weight_quantized must be float8_e4m3fn": (
        "torch_fake_quant_fp8_linear",
        TypeError,
        (X, X, None, [ONE], [ONE], [], []),
    ),
    "input_scale needs 1": ("torch_fake_quant_fp8_linear", ValueError, (X, CODES, None, [], [ONE], [], [])),
    "weight_scale needs 2": ("torch_fake_quant_nvfp4_linear", ValueError, (X, NVFP4, None, [ONE], [SCALES], [], [])),
    "weight_quantized must be uint8": ("torch_fake_quant_int4_linear", TypeError, (X, X, None, [ONE], [ONE], [], [])),
    r"needs scales \[N, K/block\]": (
        "torch_fake_quant_int4_linear",
        ValueError,
        (X, torch.zeros(4, 32, dtype=torch.uint8), None, [ONE], [torch.ones(7, 1)], [], []),
    ),
    "weight_quantized must be int32": (
        "torch_fake_quant_int4_gptq_linear",
        TypeError,
        (X, X, None, [], [ONE], [], [ONE]),
    ),
    "input must be .* got .3, 32. in torch.int32": (
        "trtllm_quant_fp8_linear",
        TypeError,
        (X.int(), CODES, None, ONE, ONE),
    ),
    "operands must be floating point": ("torch_quant_fp8_bmm", TypeError, (X[None].int(), X.T[None], ONE, ONE)),
    "alpha must have one element": (
        "torch_quant_nvfp4_linear",
        ValueError,
        (X, NVFP4, None, ONE, SCALES, torch.ones(2)),
    ),
    r"weight_quantized must be \[N, K\] with K = 32": (
        "torch_fake_quant_fp8_linear",
        ValueError,
        (X, CODES[:, :16], None, [ONE], [ONE], [], []),
    ),
    "input_scale must have 1 or K = 32 elements": (
        "torch_fake_quant_int4_linear",
        ValueError,
        (X, torch.zeros(4, 32, dtype=torch.uint8), None, [torch.ones(3)], [torch.ones(8, 1)], [], []),
    ),
    "qweight and qzeros must be int32": (
        "torch_fake_quant_int4_gptq_linear",
        TypeError,
        (X, torch.zeros(4, 8, dtype=torch.int32), None, [], [torch.ones(1, 8)], [], [torch.ones(1, 1)]),
    ),
    "x must be floating point": ("torch_quant_fn", TypeError, (X.int(), ONE)),
    r"scale \(3,\) must have one element or broadcast to x \(3, 32\)": (
        "torch_quant_fn",
        ValueError,
        (X, torch.ones(3)),
    ),
    "weight_zp needs 1": (
        "torch_fake_quant_int4_gptq_linear",
        ValueError,
        (X, torch.zeros(4, 8, dtype=torch.int32), None, [], [torch.ones(1, 8)], [], []),
    ),
}


@pytest.mark.parametrize("text", CASES)
def test_the_error_names_what_is_wrong(text):
    name, error, args = CASES[text]
    with pytest.raises(error, match=text) as caught:
        getattr(torch.ops.auto_deploy, name)(*args)
    assert name in str(caught.value)
