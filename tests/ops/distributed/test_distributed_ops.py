"""Collective operators on several ranks: results, ragged sizes, strategies, fakes, which group they run on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import shardwise.ops  # noqa: F401 - registers the operators
from shardwise.comm.base import CommError
from shardwise.comm.rank import current_groups
from shardwise.sharding.layout import ParallelLayout
from shardwise.testing import run_threads

OPS = torch.ops.auto_deploy
BACKENDS = ("torch", "trtllm")


def op(backend, name):
    return getattr(OPS, f"{backend}_dist_{name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_reduce_sums_into_a_new_tensor(backend):
    def body():
        rank = current_groups().world.rank
        x = torch.full((2, 3), rank + 1.0, dtype=torch.bfloat16)
        result = op(backend, "all_reduce")(x, "AUTO")
        assert torch.equal(x, torch.full((2, 3), rank + 1.0, dtype=torch.bfloat16))
        return result

    for result in run_threads(3, body):
        assert torch.equal(result, torch.full((2, 3), 6.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_gather_joins_equal_parts(backend, dim):
    parts = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(3)]

    def body():
        return op(backend, "all_gather")(parts[current_groups().world.rank], dim)

    for result in run_threads(3, body):
        assert torch.equal(result, torch.cat(parts, dim))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_gather_honours_ragged_sizes(backend):
    sizes = [2, 0, 3]
    parts = [torch.full((4, size), float(rank)) for rank, size in enumerate(sizes)]

    def body():
        rank = current_groups().world.rank
        with pytest.raises(ValueError, match="sizes"):
            op(backend, "all_gather")(parts[rank], 1, [1, 1, 1])
        return op(backend, "all_gather")(parts[rank], 1, sizes)

    for result in run_threads(3, body):
        assert torch.equal(result, torch.cat(parts, 1))


@pytest.mark.parametrize("strategy", ["AUTO", "NCCL", "ONESHOT", "TWOSHOT", "MIN_LATENCY"])
def test_the_fused_norm_agrees_with_float64(strategy):
    generator = torch.Generator().manual_seed(0)
    partial = [torch.randn(5, 32, generator=generator) for _ in range(4)]
    residual, weight = torch.randn(5, 32, generator=generator), torch.randn(32, generator=generator)

    def body():
        rank = current_groups().tp.rank
        return torch.ops.dist.trtllm_fused_allreduce_residual_rmsnorm(partial[rank], residual, weight, 1e-6, strategy)

    total = torch.stack(partial).double().sum(0) + residual.double()
    norm = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    for got_norm, got_total in run_threads(4, body):
        torch.testing.assert_close(got_total.double(), total, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_norm.double(), norm, rtol=2e-6, atol=2e-6)


def test_they_run_on_the_tensor_parallel_group():
    def body():
        groups = current_groups()
        x = torch.tensor([float(groups.world.rank)])
        return OPS.torch_dist_all_reduce(x, "AUTO").item(), OPS.trtllm_dist_all_gather(x).tolist()

    results = run_threads(4, body, layout=ParallelLayout(tp=2, attn_dp=2))
    assert results == [(1.0, [0.0, 1.0]), (1.0, [0.0, 1.0]), (5.0, [2.0, 3.0]), (5.0, [2.0, 3.0])]


def test_without_groups_a_process_is_one_rank():
    x = torch.randn(2, 3)
    assert torch.equal(OPS.torch_dist_all_reduce(x, "AUTO"), x)
    assert torch.equal(OPS.trtllm_dist_all_gather(x, 1), x)


@pytest.mark.parametrize("call", ["torch_dist_all_reduce", "trtllm_dist_all_reduce"])
def test_an_unknown_strategy_is_a_value_error_that_lists_the_names(call):
    with pytest.raises(ValueError, match="FASTEST.*ONESHOT"):
        getattr(OPS, call)(torch.ones(2), "FASTEST")


@pytest.mark.parametrize("strategy", ["UB", "MNNVL"])
def test_strategies_that_need_multicast_are_refused_with_the_reason(strategy):
    with pytest.raises(CommError, match=f"{strategy}.*multicast"):
        OPS.trtllm_dist_all_reduce(torch.ones(2), strategy)
    assert torch.equal(OPS.torch_dist_all_reduce(torch.ones(2), strategy), torch.ones(2)), "torch_dist ignores it"


def test_fakes_tell_the_shapes_of_the_group():
    def body():
        x = torch.ones(2, 3)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            fused = torch.ops.dist.trtllm_fused_allreduce_residual_rmsnorm(fake, fake, fake[0], 1e-6, "AUTO")
            gathered = OPS.torch_dist_all_gather(fake, 1), OPS.trtllm_dist_all_gather(fake, 0, [2, 5, 1])
            return [tuple(t.shape) for t in (*gathered, OPS.torch_dist_all_reduce(fake, "AUTO"), *fused)]

    for shapes in run_threads(3, body):
        assert shapes == [(2, 9), (8, 3), (2, 3), (2, 3), (2, 3)]
