"""Recorded calls that launch another package's Triton kernels, with a stand-in for Triton's way to a GPU."""

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch

from shardwise.kernel_start import Start
from shardwise.ops import foreign, kernel_launch, tape_writer
from shardwise.ops import recorded as module
from shardwise.ops.recorded import recorded
from shardwise.ops.registry import TRITON
from shardwise.ops.triton_support import interpreting

pytestmark = pytest.mark.skipif(not TRITON.state[0], reason=TRITON.state[1])
COUNT = 6


def scaled_kernel(source, target, count, BLOCK, FACTOR=3):
    """target += FACTOR source, in blocks."""


def added(x, _y, _z, _stream, source, target, count, block, factor):
    """What the driver runs of it, given addresses."""
    assert x == -(-count // block)
    read, write = ((ctypes.c_float * count).from_address(address) for address in (source, target))
    for at in range(count):
        write[at] += factor * read[at]


def run(self, *args, grid, warmup, num_warps=4, **named):
    """Stands for Triton's `JITFunction.run`."""
    bound = self.signature.bind(*args, **named)
    bound.apply_defaults()
    source, target, *rest = bound.arguments.values()
    cut = grid(bound.arguments) if callable(grid) else grid
    added(cut[0], 1, 1, 0, source.data_ptr(), target.data_ptr(), *rest)
    return SimpleNamespace()


def fill_zeros(out):
    out.view(-1).numpy()[:] = 0  # as a kernel would: PyTorch sees nothing of it
    start = Start(lambda x, y, z, stream, address: ctypes.memset(address, 0, out.nbytes), lambda device: 0, ())
    kernel_launch._note(start, (1, 1, 1), (out,))


@pytest.fixture(autouse=True)
def foreign_kernel(monkeypatch):
    from triton.runtime.jit import JITFunction

    busy = kernel_launch.recorders
    monkeypatch.setattr(module, "_stream", lambda tensor: None if threading.get_ident() in busy else 0)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(foreign, "start_of", lambda compiled: Start(added, lambda device: 0, ()))
    monkeypatch.setattr(tape_writer, "fill_zeros", fill_zeros)
    yield JITFunction(scaled_kernel)
    assert JITFunction.run is run


def sums(kernel, calls):
    """Of x + y and of x alone, scaled."""

    def operator(x: torch.Tensor, y: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(factor)
        both, alone = torch.zeros(2, COUNT // 2), x.new_zeros(COUNT)
        cut = lambda meta: (-(-COUNT // meta["BLOCK"]),)  # noqa: E731  as the package writes it
        kernel[cut](x, both, COUNT, 4, FACTOR=factor, num_warps=2)
        kernel[cut](source=y, target=both, count=COUNT, BLOCK=2, FACTOR=factor)
        kernel[(1,)](x, alone, COUNT, BLOCK=8)
        return both, alone

    return operator


def test_other_packages_kernels_zeros_and_several_results_are_replayed(foreign_kernel):
    calls = []
    operator = recorded()(sums(foreign_kernel, calls))
    kept = []
    for factor in (1, 5):
        for _ in range(4):
            x, y = torch.randn(2, COUNT).unbind()
            x = x.clone()
            kept.append((x, y, factor, operator(x, y, factor)))
    assert calls == [1, 1, 5, 5]
    for x, y, factor, (both, alone) in kept:
        torch.testing.assert_close(both, factor * (x + y).view(2, -1))
        torch.testing.assert_close(alone, 3 * x)


@pytest.mark.parametrize("told", [True, False], ids=["left out", "compared"])
def test_what_a_kernel_leaves_unwritten_may_be_left_out_of_the_comparison(foreign_kernel, told):
    calls = []

    @recorded(alike=(lambda results, _x, rows: (results[0][:rows],)) if told else None)
    def operator(x: torch.Tensor, rows: int) -> torch.Tensor:
        calls.append(1)
        out = torch.empty(3, COUNT)
        out.numpy()[rows:] = len(calls)
        fill_zeros(out[:rows])
        foreign_kernel[(1,)](x, out, rows * COUNT, BLOCK=rows * COUNT)
        return out

    for _ in range(4):
        x = torch.randn(2, COUNT)
        torch.testing.assert_close(operator(x, 2)[:2], 3 * x)
    assert len(calls) == (2 if told else 4)


def test_results_of_one_memory_run_as_they_are_written(foreign_kernel):
    calls = []

    @recorded()
    def operator(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        out = torch.zeros(2, COUNT)
        foreign_kernel[(1,)](x, out[0], COUNT, BLOCK=8)
        return out[0], out[1]

    for _ in range(3):
        x = torch.randn(COUNT)
        first, second = operator(x)
        torch.testing.assert_close(first, 3 * x)
        assert not second.any()
    assert len(calls) == 3


@pytest.mark.skipif(not interpreting(), reason="needs triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_zeros_are_written_to_the_last_element(dtype):
    memory = torch.ones(2, 4099, dtype=dtype)
    foreign.fill_zeros(memory[0])
    assert not memory[0].any() and memory[1].all()


def test_only_the_recording_threads_launches_are_noted_and_none_of_our_own_kernels(foreign_kernel):
    noted, out = [], torch.zeros(COUNT)

    def launch():
        foreign_kernel[(1,)](out, out, COUNT, BLOCK=8)

    with foreign.foreign_launches(lambda *launch: noted.append(launch)):
        other = threading.Thread(target=launch)
        other.start()
        other.join()
        foreign_kernel.__module__, name = "shardwise.ops.fla.kernels", foreign_kernel.__module__
        launch()
        assert not noted
        foreign_kernel.__module__ = name
        launch()
    launch()
    ((_, grid, args),) = noted
    assert grid == (1, 1, 1) and args[0] is out and args[2:] == (COUNT, 8, 3)
