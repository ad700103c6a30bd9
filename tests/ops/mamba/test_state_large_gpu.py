"""State operators whose caches or tokens lie beyond 2^31 elements, against the same step near the beginning."""

import pytest
import samples_fla
import samples_mamba
import torch
from mamba_oracle import Batch
from operator_samples import flat, mutated
from test_operator_table import INFOS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPS = torch.ops.auto_deploy
HALF = torch.bfloat16
NEAR = Batch(prefill=(40, 0, 33, 2), decode=3, slots=(4, 6, 0, 2, 5, -1, 1), resumes=(True, False, False, True))
SLOTS = 7
BUILDERS = {
    op: samples_mamba.cached_ssm_args(op, NEAR, 128, 8, 64, 128, 16, HALF)
    for op in ("triton_cached_ssm", "flashinfer_cached_ssm")
}
BUILDERS |= {
    op: samples_mamba.cached_conv_args(op, NEAR, 8192, 4, HALF)
    for op in ("triton_cached_causal_conv1d", "cuda_cached_causal_conv1d")
}
BUILDERS |= {
    "fla_cached_delta_rule": samples_fla.cached_args(False, NEAR, 32, K=64, V=64, dtype=HALF, cache=HALF),
    "fla_cached_gated_delta_rule": samples_fla.cached_args(True, NEAR, 32, K=64, V=64, dtype=HALF, cache=HALF),
}
HERE = [op for op in BUILDERS if INFOS[f"auto_deploy::{op}"].availability()[0]]


def run(op, args):
    overload = getattr(OPS, op).default
    return flat(overload(*args)), mutated(overload, args)


def the_cache(args):
    """Its place: the last tensor."""
    return max(i for i, value in enumerate(args) if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("op", HERE)
def test_slots_beyond_two_to_the_31_elements(much_memory, op):
    torch.manual_seed(0)
    near = list(BUILDERS[op]("cuda"))
    place = the_cache(near)
    cache = near[place]
    slots = next(i for i, value in enumerate(near) if isinstance(value, torch.Tensor) and value.dtype == torch.int64)
    first = 2**31 // cache[0].numel() + 1
    far = [value.clone() if isinstance(value, torch.Tensor) else value for value in near]
    far[place] = torch.zeros(first + SLOTS, *cache.shape[1:], device="cuda", dtype=cache.dtype)
    far[place][first:] = cache
    far[slots] = torch.where(far[slots] < 0, far[slots], far[slots] + first)
    (expected, states), (results, _) = run(op, near), run(op, far)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert torch.equal(far[place][first:], states[-1]) and not far[place][:first].any()


LONG = 2**31 // 8192 + 70  # tokens of 8192 channels, or of 128 heads of 64


def parts(args, one):
    """The arguments for the last 40 tokens as a step of their own; `one` is its metadata, by place."""
    last = [a[:, LONG:].clone() if isinstance(a, torch.Tensor) and a.dim() > 2 and a.shape[1] == LONG + 40 else a
            for a in args]  # fmt: skip
    return [one.get(i, a) for i, a in enumerate(last)]


@pytest.mark.parametrize("op", ["triton_cached_causal_conv1d", "cuda_cached_causal_conv1d"])
def test_tokens_of_a_convolution_beyond_two_to_the_31_elements(much_memory, op):
    if op not in HERE:
        pytest.skip(INFOS[f"auto_deploy::{op}"].availability()[1])
    torch.manual_seed(0)
    step = Batch(prefill=(LONG, 39), decode=1, slots=(0, 1, 2), resumes=(False, True))
    args = list(samples_mamba.cached_conv_args(op, step, 8192, 4, HALF)("cuda"))
    alone = Batch(prefill=(39,), decode=1, slots=(1, 2), resumes=(True,)).tensors("cuda")
    kept = alone if op.startswith("triton") else (alone[0], *alone[2:])
    last = parts(args, dict(zip(range(3, 8), kept, strict=False)))
    last[the_cache(args)] = args[the_cache(args)].clone()
    assert args[0].numel() > 2**31
    run(op, args), run(op, last)
    assert torch.equal(args[0][:, LONG:], last[0])
    assert torch.equal(args[the_cache(args)][1:3], last[the_cache(args)][1:3])


def test_tokens_of_a_scan_beyond_two_to_the_31_elements(much_memory):
    torch.manual_seed(0)
    op = "triton_cached_ssm"
    step = Batch(prefill=(LONG, 39), decode=1, slots=(0, 1, 2), resumes=(False, True))
    args = list(samples_mamba.cached_ssm_args(op, step, 128, 1, 64, 64, 256, HALF)("cuda"))
    assert args[0].numel() > 2**31
    alone = Batch(prefill=(39,), decode=1, slots=(1, 2), resumes=(True,))
    info, seq_len, bounds, slots, resumes = alone.tensors("cuda")
    positions = torch.zeros(1, 40, dtype=torch.int64, device="cuda")
    pieces = OPS.mamba_ssm_prepare_metadata(positions, info, seq_len, bounds, 256)
    last = parts(args, dict(zip(range(7, 14), (info, bounds, slots, resumes, *pieces), strict=True)))
    last[14] = args[14].clone()
    (out,), _ = run(op, args)
    (expected,), _ = run(op, last)
    torch.testing.assert_close(out[:, LONG:], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(args[14][1:3], last[14][1:3], rtol=2e-2, atol=2e-2)
