"""What every group on the peer-to-peer kernels must do, on GPUs and in Triton's interpreter on the CPU."""

import torch

from shardwise.comm.p2p.workspace import Workspace  # noqa: F401  (fails here, not in a rank, where triton is missing)

EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STRATEGIES = ("ONESHOT", "TWOSHOT", "AUTO", "MIN_LATENCY")
SHAPES = ((1, 4096), (3, 2880), (1, 7168), (70, 1024), (2, 1003), (9, 24))
CASES = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
FEW_CASES = [(torch.bfloat16, shape) for shape in ((3, 2880), (70, 1024), (2, 1003))]
"""For ranks that share a process: each compiles its own kernels, one after another."""


def everyones(world: int, shape, dtype, seed: int) -> list[torch.Tensor]:
    """All ranks' inputs, on the CPU: every rank can make them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(world)]


def rounded_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """The meaning: float32 accumulation in rank order, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-21}[found.dtype]
    difference = (found.cpu().double() - exact.double()).abs()
    assert (difference <= unit * exact.double().abs() + 1e-6).all(), difference.max()


def device_of(group) -> torch.device:
    return group.workspace.counters.device


def warm(group, call) -> None:
    """Compile what `call` launches before any rank waits: threads that share a GPU cannot load code beside a wait."""
    launcher, real = group.launcher, group.launcher._launch
    launcher._launch = lambda *args: real(*args[:-1], False)
    call()
    launcher._launch = real
    group.beyond.all_gather_object(None)


def check_sums(group, cases=CASES, strategies=STRATEGIES) -> None:
    for i, (dtype, shape) in enumerate(cases):
        parts = everyones(group.size, shape, dtype, i)
        expected = rounded_sum(parts)
        x = parts[group.rank].to(device_of(group))
        for strategy in strategies:
            out = torch.full_like(x, float("nan"))
            warm(group, lambda x=x, out=out, s=strategy: group.all_reduce(x, out=out, strategy=s))
            group.all_reduce(x, out=out, strategy=strategy)
            group.synchronize()
            assert torch.equal(out.cpu(), expected), (dtype, shape, strategy)
        group.all_reduce(x, out=x, strategy=strategies[-1])
        group.synchronize()
        assert torch.equal(x.cpu(), expected), "in place"


def check_fused(group, cases=CASES, strategies=STRATEGIES) -> None:
    for i, (dtype, shape) in enumerate(cases):
        parts = everyones(group.size, shape, dtype, 100 + i)
        residual, other = everyones(2, shape, dtype, 200 + i)
        stream = (rounded_sum(parts).float() + residual.float()).to(dtype)
        scale = torch.rsqrt(stream.double().square().mean(-1, keepdim=True) + EPS)
        device = device_of(group)
        arguments = (parts[group.rank].to(device), residual.to(device), other[0].to(device), EPS)
        results = []
        for strategy in strategies:

            def call(arguments=arguments, strategy=strategy):
                return group.all_reduce_residual_rms_norm(*arguments, weight_bias=1.0, strategy=strategy)

            warm(group, call)
            normed, total = call()
            group.synchronize()
            assert torch.equal(total.cpu(), stream), (dtype, shape, strategy)
            assert_close(normed, stream.double() * scale * (other[0].double() + 1))
            results.append(normed.cpu())
        assert all(torch.equal(result, results[0]) for result in results), "strategies agree in every bit"
        digests = group.beyond.all_gather_object(results[0].view(torch.uint8).numpy().tobytes())
        assert all(digest == digests[0] for digest in digests), "ranks agree in every bit"


def check_pieces(group) -> None:
    """Calls larger than a region go in several launches."""
    elements = 5 * group.workspace.region_bytes // 16 + 8
    parts = everyones(group.size, (elements,), torch.float32, 5)
    x = parts[group.rank].to(device_of(group))
    for strategy in ("ONESHOT", "TWOSHOT"):
        out = torch.empty_like(x)
        warm(group, lambda out=out, s=strategy: group.all_reduce(x, out=out, strategy=s))
        group.all_reduce(x, out=out, strategy=strategy)
        group.synchronize()
        assert torch.equal(out.cpu(), rounded_sum(parts))
