"""Recorded calls on the CPU, with kernels that take addresses as those of a GPU do."""

import ctypes
from threading import get_ident

import pytest
import torch

from shardwise.kernel_start import Start
from shardwise.ops import kernel_launch, tape_writer, workspace
from shardwise.ops import recorded as module
from shardwise.ops.kernel_launch import Kept
from shardwise.ops.recorded import recorded
from shardwise.ops.workspace import Workspace

COUNT = 6


def doubled(_x, _y, _z, _stream, source, target, count, added):
    """A kernel: target = 2 source + added, of floats."""
    read, write = ((ctypes.c_float * count).from_address(address) for address in (source, target))
    for at in range(count):
        write[at] = 2 * read[at] + added


START = Start(doubled, lambda device: 0, ())


def launch(source, target, added=0.0):
    args = source, target, source.numel(), added
    doubled(1, 1, 1, 0, source.data_ptr(), target.data_ptr(), *args[2:])
    kernel_launch._note(START, (1, 1, 1), args)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(module, "_stream", lambda tensor: None if get_ident() in kernel_launch.recorders else 0)
    monkeypatch.setattr(workspace, "_THREAD", type(workspace._THREAD)())


def four_times(calls, between=lambda inner: None):
    def operator(x: torch.Tensor, y: torch.Tensor, added: float = 1.0) -> torch.Tensor:
        calls.append(added)
        inner, out = torch.empty(COUNT), torch.empty(2, COUNT)
        launch(x[1:3].view(-1), inner, added)
        between(inner)
        launch(inner, out[0])
        launch(y, out[1])
        return out

    return operator


def drawn():
    return torch.randn(4, COUNT // 2), torch.randn(COUNT)


def expected(x, y, added):
    return torch.stack([2 * (2 * x[1:3].reshape(-1) + added), 2 * y])


def test_from_the_third_call_on_launches_run_without_the_function():
    calls = []
    operator = recorded()(four_times(calls))
    for added in (1.0, 3.0):
        for _ in range(4):
            x, y = drawn()
            torch.testing.assert_close(operator(x, y, added), expected(x, y, added))
    x, y = drawn()
    torch.testing.assert_close(operator(x, y), expected(x, y, 1.0))  # another number of arguments: another layout
    assert calls == [1.0, 1.0, 3.0, 3.0, 1.0]


def test_large_results_are_not_recorded(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 4 * 2 * COUNT - 1)  # bytes
    calls = []
    operator = recorded()(four_times(calls))
    for _ in range(3):
        x, y = drawn()
        torch.testing.assert_close(operator(x, y), expected(x, y, 1.0))
    assert len(calls) == 3


def test_calls_for_whose_second_run_no_memory_is_left_run_as_they_are_written(monkeypatch):
    def exhausted(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_poisoned", lambda tape: exhausted)
    calls = []
    operator = recorded()(four_times(calls))
    for _ in range(4):
        x, y = drawn()
        torch.testing.assert_close(operator(x, y), expected(x, y, 1.0))
    assert len(calls) == 4


def test_results_do_not_share_memory():
    operator = recorded()(four_times([]))
    given = [drawn() for _ in range(5)]
    results = [operator(*pair) for pair in given]
    for (x, y), result in zip(given, results, strict=True):
        torch.testing.assert_close(result, expected(x, y, 1.0))


@pytest.mark.parametrize(
    "between",
    [
        lambda inner: inner.mul_(1.0),  # PyTorch's own kernel
        lambda inner: inner.sum().item(),
        lambda inner: ctypes.c_float.from_address(inner.data_ptr()).__setattr__("value", 7.0),  # work that no one notes
    ],
    ids=["in place", "on the host", "unseen"],
)
def test_what_cannot_be_replayed_runs_as_it_is_written(between):
    calls = []
    operator, plain = recorded()(four_times(calls, between)), four_times([], between)
    for _ in range(4):
        x, y = drawn()
        torch.testing.assert_close(operator(x, y), plain(x, y))
    assert len(calls) == 4


def test_a_tensor_given_twice_and_views_of_one_memory_run_right():
    calls = []

    @recorded()
    def operator(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = torch.empty(2, COUNT)
        launch(x, out[0])
        launch(y, out[1])
        return out

    for x in torch.randn(4, COUNT).unbind():
        assert torch.equal(operator(x, x), 2 * x.expand(2, COUNT))
    assert len(calls) == 4
    for _ in range(4):  # recorded with two views of one memory, of which only the arguments' identity tells
        both = torch.randn(2, COUNT)
        assert torch.equal(operator(*both.unbind()), 2 * both)
        assert torch.equal(operator(*both.flip(0).unbind()), 2 * both.flip(0))
    assert len(calls) == 6


def test_scratch_memory_of_a_workspace_is_used_and_counters_keep_their_zeros():
    calls = []

    @recorded()
    def operator(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        space = Workspace.of(x.device, 1)
        inner, counters, out = space.take("inner", (COUNT,), torch.float32), space.counters(2), torch.empty(COUNT)
        launch(x, inner)
        launch(inner, out)
        kernel_launch._note(Start(lambda *args: None, lambda device: 0, ()), (1, 1, 1), (counters,))
        assert not counters.any()
        return out

    for _ in range(4):
        x = torch.randn(COUNT)
        assert torch.equal(operator(x), 4 * x)
    assert len(calls) == 4  # `any` is PyTorch's
    assert not Workspace.of(x.device, 1).counters(2).any()


def test_forms_that_follow_from_values_have_tapes_of_their_own():
    calls = []

    def beside(x, kind_of):
        return Kept((WEIGHTS[kind_of.item()],)), kind_of.item()

    @recorded(beside=beside)
    def operator(x: torch.Tensor, kind_of: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = torch.empty(COUNT)
        launch(WEIGHTS[KINDS[id(kind_of)]], out, float(KINDS[id(kind_of)]))
        return out

    WEIGHTS = [torch.randn(COUNT), torch.randn(COUNT)]
    kinds = [torch.tensor(0), torch.tensor(1)]
    KINDS = {id(kind): at for at, kind in enumerate(kinds)}
    for _ in range(4):
        for at, kind in enumerate(kinds):
            torch.testing.assert_close(operator(torch.randn(COUNT), kind), 2 * WEIGHTS[at] + at)
    assert len(calls) == 3  # the first of the layout, and one of each form


def test_tensors_that_are_not_read_do_not_tell_layouts_apart():
    calls = []

    @recorded(unread=("other",))
    def operator(x: torch.Tensor, other: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(1)
        out = torch.empty(COUNT)
        launch(x if bias is None else bias, out)
        return out

    for count in range(1, 4):
        x = torch.randn(COUNT)
        assert torch.equal(operator(x, torch.empty(count)), 2 * x)
    for _ in range(3):
        x, bias = torch.randn(COUNT), torch.randn(COUNT)
        assert torch.equal(operator(x, x, bias), 2 * bias)
    assert len(calls) == 4


@pytest.mark.parametrize("last", [False, True], ids=["product between launches", "product at the end"])
@pytest.mark.parametrize("part", [slice(1, 4), slice(0, 3), slice(0, 4)], ids=["end", "beginning", "whole"])
def test_products_stand_between_launches(monkeypatch, last, part):
    aten, calls = torch.ops.aten, []
    monkeypatch.setattr(tape_writer, "_PRODUCTS", {aten.mm.default: torch.mm, aten.addmm.default: torch.addmm})

    @recorded()
    def operator(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(1)
        inner = torch.empty(2, 3)
        launch(x, inner)
        product = torch.nn.functional.linear(inner, weight[part], bias)
        if last:
            return product[:, :2]
        out = torch.empty(product.shape)
        launch(product, out)
        return out

    for biased in (False, True):
        for _ in range(4):
            x, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)[part] if biased else None
            expected = torch.nn.functional.linear(2 * x, weight[part], bias)
            torch.testing.assert_close(operator(x, weight, bias), expected[:, :2] if last else 2 * expected)
    assert len(calls) == 4
    weight.requires_grad_()
    for _ in range(3):
        assert operator(x, weight, bias).requires_grad == last


def test_a_product_of_given_tensors_alone_is_not_left_out(monkeypatch):
    monkeypatch.setattr(tape_writer, "_PRODUCTS", {torch.ops.aten.mm.default: torch.mm})
    calls = []

    @recorded()
    def operator(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = torch.empty(2, 2)
        launch(x @ y.t(), out)
        return out

    for _ in range(4):
        x, y = torch.randn(2, 2, 3).unbind()
        x = x.clone()
        torch.testing.assert_close(operator(x, y), 2 * (x @ y.t()))
    assert len(calls) == 2


def test_an_operator_that_calls_another_has_its_launches():
    calls, inner = [], recorded()(four_times([]))

    @recorded()
    def operator(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return inner(x, y, 2.0)

    for _ in range(5):
        x, y = drawn()
        torch.testing.assert_close(operator(x, y), expected(x, y, 2.0))
    assert len(calls) == 2
