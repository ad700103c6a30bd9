"""What every group on the peer-to-peer kernels must do, on GPUs and in Triton's interpreter on the CPU."""

import itertools
import math

import torch

from shardwise.comm.p2p.fp8 import LANE_VALUES
from shardwise.comm.p2p.launch import FP8_LANES
from shardwise.comm.watch import FLIGHT

EPS = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STRATEGIES = ("ONESHOT", "TWOSHOT", "AUTO", "MIN_LATENCY")
SHAPES = ((1, 4096), (3, 2880), (1, 7168), (70, 1024), (2, 1003), (9, 24))
CASES = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
GATHERS = [
    (torch.bfloat16, (1, 4096), 0),
    (torch.bfloat16, (3, 512), -1),
    (torch.bfloat16, (3, 8), -1),
    (torch.int64, (3, 5, 2), 1),
    (torch.uint8, (13,), 0),
    (torch.uint8, (2, 7), -1),
    (torch.float32, (1, 1), -1),
    (torch.complex64, (5, 3), 0),
]
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
    launcher = group.launcher
    launcher._start = lambda *_: None
    call()
    del launcher._start
    group.fallback.all_gather_object(None)


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
        digests = group.fallback.all_gather_object(results[0].view(torch.uint8).numpy().tobytes())
        assert all(digest == digests[0] for digest in digests), "ranks agree in every bit"


def check_repeats(group) -> None:
    """Calls of one layout: what follows from it is kept, and every call is recorded, also of tensors that begin where
    the kernels' accesses may not, and after the mode has changed."""
    weight = torch.ones(96).bfloat16().to(device_of(group))
    for turn, (first, deterministic) in enumerate(itertools.product((0, 0, 3, 3), (False, True))):
        parts = everyones(group.size, (2, 96), torch.bfloat16, 500 + turn)
        expected, group.deterministic = rounded_sum(parts), deterministic
        x = torch.empty(first + 192, dtype=torch.bfloat16, device=device_of(group))[first:].view(2, 96)
        x.copy_(parts[group.rank])

        y = x.clone()

        def call(x=x, y=y):
            group.all_reduce(y, out=y)
            return group.all_reduce(x), *group.all_reduce_residual_rms_norm(x, x, weight, EPS), group.all_gather(x, 1)

        warm(group, call)
        before = group.sequence
        total, normed, stream, joined = call()
        group.synchronize()
        assert torch.equal(total.cpu(), expected)
        assert torch.equal(stream.cpu(), (expected.float() + parts[group.rank].float()).bfloat16())
        assert_close(normed, torch.nn.functional.rms_norm(stream.cpu().double(), (96,), eps=EPS))
        assert torch.equal(joined.cpu(), torch.cat(parts, 1))
        y.copy_(x)
        assert torch.equal(group.all_reduce(y, out=y).cpu(), expected)
        rows = [row for row in FLIGHT.rows() if row["rank"] == group.ranks[group.rank]][-4:-1]
        assert [row["op"] for row in rows] == ["all_reduce", "all_reduce_residual_rms_norm", "all_gather"]
        assert [row["sequence"] for row in rows] == [before + 2, before + 3, before + 4]
        assert all(row["shape"] == [2, 96] and row["end"] >= row["begin"] for row in rows)
    group.deterministic = False


def check_gathers(group) -> None:
    """Bytes arrive as they are, whatever they mean, from any address, in any number, again and again."""
    for i, (dtype, shape, dim) in enumerate(GATHERS):
        generator = torch.Generator().manual_seed(400 + i)
        nbytes = math.prod(shape) * dtype.itemsize
        parts = [torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8) for _ in range(group.size)]
        for part in parts:
            part[: nbytes // 2] = 255
        expected = torch.cat([part.view(*shape, dtype.itemsize) for part in parts], dim % len(shape))
        memory = torch.zeros(math.prod(shape) + i % 2, dtype=dtype, device=device_of(group))
        x = memory[i % 2 :].view(shape)
        x.copy_(parts[group.rank].view(dtype).view(shape))
        if i % 3 == 2:
            x = x.mT.contiguous().mT
        warm(group, lambda x=x, dim=dim: group.all_gather(x, dim))
        for _ in range(2):
            joined = group.all_gather(x, dim)
            group.synchronize()
            assert joined.dtype == dtype and joined.is_contiguous()
            found = joined.cpu().view(-1).view(torch.uint8).view(expected.shape)
            assert torch.equal(found, expected), (dtype, shape, dim)


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


def decoded(x: torch.Tensor) -> torch.Tensor:
    """What arrives of x [n] under LOWPRECISION, float32, by torch's own conversion to e4m3."""
    row = FP8_LANES * LANE_VALUES
    padded = torch.zeros(-(-x.numel() // row) * row)
    padded[: x.numel()] = x.float()
    groups = padded.view(-1, 4, 4, FP8_LANES, 8)  # row, group, part, lane, value
    least = (groups.abs().amax((2, 4), keepdim=True) * (1 / 448)).clamp_min(2.0**-120)
    scale = ((least.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).view(-1)[: x.numel()]


def check_low_precision(group, counts=(8, 2880, 40_000, 100_003), dtypes=DTYPES[:2], in_place=True) -> None:
    """Bitwise what the definition says; near the exact sum as stated; outliers do not spoil their neighbours."""
    for i, (count, dtype) in enumerate(itertools.product(counts, dtypes)):
        parts = everyones(group.size, (count,), dtype, 300 + i)
        for part in parts:
            part[::97] *= 100
        sent = [decoded(part) for part in parts]
        x = parts[group.rank].to(device_of(group))
        warm(group, lambda x=x: group.all_reduce(x, strategy="LOWPRECISION"))
        out = group.all_reduce(x, strategy="LOWPRECISION")
        group.synchronize()
        total = sent[0]
        for values in sent[1:]:
            total = total + values
        assert torch.equal(out.cpu(), total.to(dtype)), (count, dtype)
        largest = max(part.abs().max().item() for part in parts)
        bound = sum((part.double().abs() / 16).clamp_min(2 * largest / 448 / 1024) for part in parts)
        exact = torch.stack([part.double() for part in parts]).sum(0)
        assert ((out.cpu().double() - exact).abs() <= bound + exact.abs() * torch.finfo(dtype).eps).all()
        if in_place:
            group.all_reduce(x, out=x, strategy="LOWPRECISION")
            group.synchronize()
            assert torch.equal(x, out)
