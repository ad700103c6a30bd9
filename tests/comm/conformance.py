"""What every transport must do: one list of cases, run on one rank, checked against float64 sums of all ranks' inputs.

A case is a function of the group that raises when the group is wrong. Every rank draws all ranks' inputs from the same
seed, so each can work out the right answer alone. Tensors lie on torch's default device.
"""

import itertools
from functools import partial

import torch

from shardwise import partition
from shardwise.comm.base import CommError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHAPES = ((1,), (7,), (3, 5), (2, 3, 4), (33, 65), (0,), (4, 0))
LARGE = (300_001, 1_500_000)


def drawn(group, shape, dtype, seed) -> list[torch.Tensor]:
    """The inputs of all ranks."""
    inputs = []
    for rank in range(group.size):
        generator = torch.Generator("cpu").manual_seed(1000 * seed + group.ranks[rank])
        if dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator, device="cpu").to(dtype))
        elif dtype == torch.bool:
            inputs.append(torch.rand(shape, generator=generator, device="cpu") < 0.5)
        else:
            inputs.append(torch.randint(0, 9, shape, generator=generator, device="cpu").to(dtype))
    return [x.to(torch.get_default_device()) for x in inputs]


def assert_sum(result, inputs):
    """Within rounding: one rounding for 16-bit floats, one an addition for the wider ones; integers exactly."""
    dtype = inputs[0].dtype
    exact = torch.stack([x.double() for x in inputs]).sum(0)
    assert result.shape == inputs[0].shape and result.dtype == dtype, (result.shape, result.dtype)
    if not dtype.is_floating_point:
        assert torch.equal(result.double(), exact)
        return
    magnitude = torch.stack([x.double().abs() for x in inputs]).sum(0)
    wide = torch.finfo(dtype).eps * (len(inputs) - 1)
    accumulated = torch.finfo(torch.float32).eps * len(inputs)
    if dtype in (torch.bfloat16, torch.float16):
        bound = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + magnitude * accumulated + torch.finfo(dtype).tiny
    else:
        bound = magnitude * wide
    assert ((result.double() - exact).abs() <= bound).all(), (result.double() - exact).abs().max()


def assert_near(result, exact, rtol):
    """Within rtol * (2 + |exact|). Not by torch.testing, whose first call takes each of these processes 0.6 s."""
    assert result.shape == exact.shape
    difference = (result.double() - exact).abs()
    assert (difference <= rtol * (2 + exact.abs())).all(), difference.max()


def sums(group):
    for seed, (dtype, shape) in enumerate(itertools.product(FLOATS + INTEGERS, SHAPES)):
        inputs = drawn(group, shape, dtype, seed)
        mine = inputs[group.rank]
        kept = mine.clone()
        assert_sum(group.all_reduce(mine), inputs)
        assert torch.equal(mine, kept), "the input was changed"
        assert group.all_reduce(kept, out=kept) is kept
        assert_sum(kept, inputs)
    for count in LARGE:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = drawn(group, (count,), dtype, count)
            assert_sum(group.all_reduce(inputs[group.rank]), inputs)


def integers_wrap_around(group):
    """Also where a library sums with vectors, and in the elements that are left over."""
    for dtype in INTEGERS:
        most = torch.iinfo(dtype).max
        for values in (torch.full((67,), most - 3, dtype=dtype), torch.arange(most - 2, most, dtype=dtype)):
            expected = values * group.size
            own = values.clone()
            assert torch.equal(group.all_reduce(values), expected)
            assert torch.equal(group.all_reduce(own, out=own), expected)
            for strategy in ("ONESHOT", "TWOSHOT"):
                if group.transport == "p2p":
                    refusal = raises(CommError, partial(group.all_reduce, values, strategy=strategy))
                    assert f"sums bfloat16, float16, float32, not {dtype}" in refusal
                else:
                    assert torch.equal(group.all_reduce(values, strategy=strategy), expected)


def repeated_small_sums(group):
    """The second call of a shape takes the prepared path; slots alternate."""
    for step in range(50):
        shape = ((64,), (3, 21), (64,))[step % 3]
        inputs = drawn(group, shape, torch.float32, step)
        out = torch.empty(shape)
        assert group.all_reduce(inputs[group.rank], out=out) is out
        assert_sum(out, inputs)


def accumulated_sums(group):
    """Sums that are added to a total, whatever else the group does in between."""
    for dtype, shape in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), ((64,), (3, 1, 32), (70_000,))
    ):
        total = torch.ones(shape, dtype=dtype)
        accumulator = group.accumulator(total)
        exact = torch.ones(shape, dtype=torch.float64)
        for step in range(5):
            inputs = drawn(group, shape, dtype, step)
            accumulator.term().copy_(inputs[group.rank])
            accumulator.add()
            exact += torch.stack([x.double() for x in inputs]).sum(0)
            if step % 2:
                group.barrier()
        assert accumulator.total is total
        assert_near(total, exact, rtol=20 * torch.finfo(dtype).eps)


def strided_sums(group):
    inputs = drawn(group, (6, 10), torch.float32, 1)
    turned = [x.t() for x in inputs]
    for _ in range(2):
        assert_sum(group.all_reduce(turned[group.rank]), turned)
    target = torch.zeros(6, 20)[:, ::2]
    group.all_reduce(inputs[group.rank], out=target)
    assert_sum(target, inputs)
    inside = inputs[group.rank].clone().t()
    assert group.all_reduce(inside, out=inside) is inside
    assert_sum(inside, turned)


def lone_elements_of_a_column(group):
    """Torch calls them contiguous, whatever their stride."""
    mine = torch.tensor([[group.rank + 1.0, -1.0]])[:, 0]
    sizes = [1] * (group.size - 1) + [0]
    assert group.all_gather(mine).tolist() == list(range(1, group.size + 1))
    assert group.all_gather(mine[: sizes[group.rank]], 0, sizes).tolist() == list(range(1, group.size))
    for strategy in ("AUTO", "ONESHOT", "TWOSHOT"):
        out = torch.full((1, 2), 9.0)
        group.all_reduce(mine, out=out[:, 0], strategy=strategy)
        assert out.tolist() == [[sum(range(group.size + 1)), 9.0]]
    assert group.all_to_all(mine, [1] + [0] * (group.size - 1)).numel() == (group.size if group.rank == 0 else 0)
    table = torch.full((1, 2), float(group.rank))
    group.broadcast(table[:, 0], group.size - 1)
    assert table.tolist() == [[group.size - 1, group.rank]]


def all_ranks_have_equal_bits(group):
    for count in (100, 40_000, 400_000):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = drawn(group, (count,), dtype, count)
            result = group.all_reduce(inputs[group.rank])
            again = group.all_reduce(inputs[group.rank])
            assert torch.equal(result, again), "not repeatable"
            for other in group.all_gather(result[None]):
                assert torch.equal(other, result), "ranks differ"
    accumulator = group.accumulator(torch.zeros(576))
    for step in range(4):
        accumulator.term().copy_(drawn(group, (576,), torch.float32, step)[group.rank])
        accumulator.add()
    for other in group.all_gather(accumulator.total[None]):
        assert torch.equal(other, accumulator.total), "ranks differ"


def strategies_agree(group):
    inputs = drawn(group, (5, 77), torch.float32, 3)
    for strategy in ("AUTO", "ONESHOT", "TWOSHOT", "MIN_LATENCY", "NCCL"):
        assert_sum(group.all_reduce(inputs[group.rank], strategy=strategy), inputs)
    for strategy in ("UB", "MNNVL"):
        message = raises(CommError, lambda s=strategy: group.all_reduce(inputs[group.rank], strategy=s))
        assert "multicast" in message
    message = raises(ValueError, lambda: group.all_reduce(inputs[group.rank], strategy="FASTEST"))
    assert "ONESHOT" in message and "FASTEST" in message


def gathers(group):
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)
    for dtype in dtypes:
        for shape, dim in (((3,), 0), ((2, 5), 0), ((2, 5), 1), ((2, 3, 4), -2), ((2, 0), 0)):
            inputs = drawn(group, shape, torch.float32, 5)
            inputs = [x.to(dtype) for x in inputs]
            result = group.all_gather(inputs[group.rank], dim)
            assert result.dtype == dtype
            assert torch.equal(result.float(), torch.cat([x.float() for x in inputs], dim))


def ragged_gathers(group):
    for sizes in (
        [rank + 1 for rank in range(group.size)],
        [0] * (group.size - 1) + [5],
        list(partition.lengths(7, group.size)),
    ):
        for dim in (0, 1, 2):
            pieces = [torch.full(_with((2, 3, 4), dim, size), float(rank)) for rank, size in enumerate(sizes)]
            result = group.all_gather(pieces[group.rank], dim, sizes)
            assert torch.equal(result, torch.cat(pieces, dim))
    big = [200_000 * (rank + 1) for rank in range(group.size)]
    pieces = [torch.arange(size) + rank for rank, size in enumerate(big)]
    assert torch.equal(group.all_gather(pieces[group.rank], 0, big), torch.cat(pieces))


def reduce_scatters(group):
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int16):
        for shape, dim in (((8,), 0), ((7, 3), 0), ((3, 11), 1), ((2, 1, 9), -1)):
            inputs = drawn(group, shape, dtype, 7)
            start, stop = partition.extent(shape[dim], group.size, group.rank)
            result = group.reduce_scatter(inputs[group.rank], dim)
            assert_sum(result, [x.narrow(dim, start, stop - start) for x in inputs])
    sizes = [3] * (group.size - 1) + [0]
    inputs = drawn(group, (sum(sizes), 2), torch.float32, 8)
    result = group.reduce_scatter(inputs[group.rank], 0, sizes)
    assert_sum(result, [x.split(sizes)[group.rank] for x in inputs])
    inputs = drawn(group, (700_001,), torch.float32, 9)
    start, stop = partition.extent(700_001, group.size, group.rank)
    assert_sum(group.reduce_scatter(inputs[group.rank]), [x[start:stop] for x in inputs])


def all_to_alls(group):
    inputs = drawn(group, (2 * group.size, 3), torch.bfloat16, 11)
    expected = torch.cat([x[2 * group.rank : 2 * group.rank + 2] for x in inputs])
    assert torch.equal(group.all_to_all(inputs[group.rank]), expected)
    for width in (1, 50_000):
        counts = [[(i + 2 * j) % 3 for j in range(group.size)] for i in range(group.size)]
        rows = [torch.arange(sum(c) * width).view(-1, width) + 1000 * i for i, c in enumerate(counts)]
        expected = torch.cat([x.split(c)[group.rank] for x, c in zip(rows, counts, strict=True)])
        receives = [c[group.rank] for c in counts]
        for known in (receives, None):
            assert torch.equal(group.all_to_all(rows[group.rank], counts[group.rank], known), expected)
    nothing = group.all_to_all(torch.empty(0, 4), [0] * group.size)
    assert nothing.shape == (0, 4)


def broadcasts(group):
    for root in range(group.size):
        for shape in ((3, 4), (0,), (700_000,)):
            inputs = drawn(group, shape, torch.float32, root)
            mine = inputs[group.rank].clone()
            assert group.broadcast(mine, root) is mine
            assert torch.equal(mine, inputs[root])
    turned = drawn(group, (4, 6), torch.float32, 3)[group.rank].t()
    group.broadcast(turned, 0)
    assert torch.equal(turned, drawn(group, (4, 6), torch.float32, 3)[0].t())


def objects(group):
    values = group.all_gather_object({"rank": group.rank, "text": "x" * 5000 * group.rank})
    assert [v["rank"] for v in values] == list(range(group.size))
    assert [len(v["text"]) for v in values] == [5000 * rank for rank in range(group.size)]
    assert group.broadcast_object(("from", group.rank), root=group.size - 1) == ("from", group.size - 1)
    group.barrier()


def fused_norms(group):
    for dtype, bias in itertools.product(FLOATS, (0.0, 1.0)):
        inputs = drawn(group, (3, 48), dtype, 13)
        residual, weight = drawn(group, (3, 48), dtype, 14)[0], drawn(group, (48,), dtype, 15)[0]
        kept = residual.clone()
        norm, total = group.all_reduce_residual_rms_norm(
            inputs[group.rank], residual, weight, 1e-6, weight_bias=bias, strategy="AUTO"
        )
        exact = torch.stack([x.double() for x in inputs]).sum(0) + residual.double()
        scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * (weight.double() + bias)
        eps = torch.finfo(dtype).eps
        assert norm.dtype == total.dtype == dtype
        assert_near(total, exact, rtol=2 * eps)
        assert_near(norm, scaled, rtol=4 * eps)
        assert torch.equal(residual, kept), "the residual was changed"


def sub_groups(group):
    if group.size < 3:
        parts = group.split(group.rank)
        assert parts.size == 1 and parts.ranks == (group.ranks[group.rank],)
        assert torch.equal(parts.all_reduce(torch.ones(3)), torch.ones(3))
        reverse = group.split(0, key=-group.rank)
        assert reverse.ranks == tuple(reversed(group.ranks))
        inputs = drawn(reverse, (9,), torch.float32, 17)
        assert_sum(reverse.all_reduce(inputs[reverse.rank]), inputs)
        return
    part = group.split(group.rank % 2)
    assert part.ranks == tuple(r for i, r in enumerate(group.ranks) if i % 2 == group.rank % 2)
    for case in (repeated_small_sums, ragged_gathers, all_to_alls, objects):
        case(part)
    whole = group.split(7, key=-group.rank)
    assert whole.ranks == tuple(reversed(group.ranks))
    assert [v for v in whole.all_gather_object(whole.rank)] == list(range(whole.size))


def bad_arguments(group):
    x = torch.ones(4, 6)
    assert "dim 2" in raises(ValueError, lambda: group.all_gather(x, 2))
    assert "sizes" in raises(ValueError, lambda: group.all_gather(x, 0, [4] * (group.size + 1)))
    assert "add up to 6" in raises(ValueError, lambda: group.reduce_scatter(x, 1, [7] * group.size))
    assert "rows" in raises(ValueError, lambda: group.all_to_all(x, [9] * group.size))
    assert "root 99" in raises(ValueError, lambda: group.broadcast(x, 99))
    assert "out is" in raises(ValueError, lambda: group.all_reduce(x, out=torch.ones(6, 4)))
    assert "sum" in raises(TypeError, lambda: group.all_reduce(x.to(torch.float8_e4m3fn)))
    assert "residual" in raises(ValueError, lambda: group.all_reduce_residual_rms_norm(x, x[:2], x[0], 1e-6))
    assert "weight" in raises(ValueError, lambda: group.all_reduce_residual_rms_norm(x, x, x[:, 0], 1e-6))
    elsewhere = x.to("meta")
    assert "on meta" in raises(ValueError, lambda: group.all_reduce_residual_rms_norm(x, elsewhere, x[0], 1e-6))
    assert "on meta" in raises(ValueError, lambda: group.all_reduce_residual_rms_norm(x, x, elsewhere[0], 1e-6))
    inputs = drawn(group, (5,), torch.float32, 19)
    assert_sum(group.all_reduce(inputs[group.rank]), inputs)


def gradients_are_ignored(group):
    inputs = drawn(group, (5,), torch.float32, 23)
    mine = inputs[group.rank].requires_grad_()
    for _ in range(2):
        result = group.all_reduce(mine)
        assert not result.requires_grad
        assert_sum(result, [x.detach() for x in inputs])
    for _ in range(2):
        target = torch.zeros(5, requires_grad=True)
        group.all_reduce(mine.detach(), out=target)
        assert_sum(target.detach(), [x.detach() for x in inputs])
    with torch.inference_mode():
        assert_sum(
            group.all_reduce(torch.ones(5) * (group.rank + 1)), [torch.ones(5) * (r + 1) for r in range(group.size)]
        )
    assert_sum(group.all_reduce(mine.detach()), [x.detach() for x in inputs])


CASES = (
    sums,
    integers_wrap_around,
    repeated_small_sums,
    accumulated_sums,
    strided_sums,
    lone_elements_of_a_column,
    strategies_agree,
    gathers,
    ragged_gathers,
    reduce_scatters,
    all_to_alls,
    broadcasts,
    objects,
    fused_norms,
    sub_groups,
    bad_arguments,
    gradients_are_ignored,
)
FIXED_ORDER_CASES = (all_ranks_have_equal_bits,)


def raises(kind, call) -> str:
    """Text of the `kind` that `call` raises; the group must stay usable."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def run(group, cases=CASES) -> list[str]:
    """Names of the cases that passed; the first failure is raised with its case's name."""
    for case in cases:
        print(f"{case.__name__} on {group!r}", flush=True)  # a run that is cut off says how far it came
        try:
            case(group)
        except Exception as error:
            raise AssertionError(f"{case.__name__} on {group!r}: {type(error).__name__}: {error}") from error
    return [case.__name__ for case in cases]


def _with(shape, dim, size):
    return tuple(size if i == dim else n for i, n in enumerate(shape))
