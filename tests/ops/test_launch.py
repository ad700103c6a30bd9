"""Cached launches: what makes a new compiled form, and what the compiled form is called with."""

import threading
from types import SimpleNamespace

import pytest
import torch

from shardwise import kernel_start
from shardwise.ops import kernel_launch, nvcc, repeated
from shardwise.ops.registry import NVCC, OperatorUnavailable

DEVICE = torch.device("cpu")


class Run:
    """Triton's launcher of a compiled kernel: called itself, or by its C function `launch`."""

    launch_cooperative_grid, launch_pdl, profile_scratch_size = "cooperative", "pdl", 0

    def __init__(self, note, scratch):
        self.note, self.global_scratch_size = note, scratch

    def __call__(self, x, y, z, stream, function, metadata, *rest):
        assert self.global_scratch_size
        assert (stream, function, metadata) == ("stream of None", "function", "metadata")
        assert rest[:3] == (None, None, None)  # launch metadata and hooks
        self.note((x, y, z), rest[3:])

    def launch(self, x, y, z, stream, function, cooperative, pdl, *rest):
        assert not self.global_scratch_size
        assert (stream, function, cooperative, pdl) == ("stream of None", "function", "cooperative", "pdl")
        assert rest[:6] == (None, None, "metadata", None, None, None)  # scratch memory, then as above
        self.note((x, y, z), rest[6:])


class Compiled:
    """A compiled kernel that notes its launches, on any way to the driver."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, scratch=0):
        self.calls = []
        self.run = Run(self.note, scratch)

    def __getitem__(self, grid):
        return lambda *args: self.note(grid, args)

    def note(self, grid, args):
        if any(isinstance(value, int) and 2**31 <= value < 2**32 for value in args[1:]) and self is not Jit.wide:
            raise OverflowError("signed integer is greater than maximum")
        self.calls.append((grid, args))


class Jit:
    """A kernel that notes its compilations; the last one takes numbers beyond 32 bits."""

    wide = None

    def __init__(self, scratch=0):
        self.compilations, self.forms, self._scratch = [], [], scratch

    def __getitem__(self, grid):
        def run(*args, **options):
            self.compilations.append((grid, args, options))
            self.forms.append(Compiled(self._scratch))
            return self.forms[-1]

        return run


@pytest.fixture(params=[(True, 0), (True, 128), (False, 0)], ids=["direct", "with scratch memory", "through Triton"])
def jit(monkeypatch, request):
    direct, scratch = request.param
    monkeypatch.setattr(kernel_launch, "_INTERPRETING", False)
    monkeypatch.setattr(kernel_start, "DIRECT", direct)
    monkeypatch.setattr(kernel_start, "raw_stream", lambda: lambda device: f"stream of {device}")
    monkeypatch.setattr(kernel_launch, "current_device", lambda: None)
    return Jit(scratch)


def test_equal_launches_compile_once_and_pass_addresses(jit):
    kernel = kernel_launch.Kernel(jit)
    x = torch.zeros(8)
    kernel(DEVICE, (2, 1, 1), (x,), (3, 0.5), (16, True), warps=4, pdl=True)
    kernel(DEVICE, (5, 1, 1), (x,), (7, 1.5), (16, True), warps=4, pdl=True)
    assert jit.compilations == [
        ((2, 1, 1), (x, 3, 0.5, 16, True), {"num_warps": 4, "num_stages": 2, "launch_pdl": True})
    ]
    assert jit.forms[0].calls == [((5, 1, 1), (x.data_ptr(), 7, 1.5, 16, True))]


def test_a_form_is_launched_without_its_key(jit):
    form = kernel_launch.Kernel(jit).form(DEVICE, (16,), warps=4)
    x = torch.zeros(8)
    for grid, count in (((2, 1, 1), 3), ((5, 1, 1), 7), ((0, 1, 1), 9)):
        form(grid, (x,), (count,))
    form((1, 1, 1), (x[1:],), (7,))
    assert len(jit.compilations) == 2
    assert jit.forms[0].calls == [((5, 1, 1), (x.data_ptr(), 7, 16))]


def test_a_chain_launches_its_kernels_in_order_with_the_addresses_of_their_tensors(jit):
    second = Jit()
    forms = [kernel_launch.Kernel(kernel).form(DEVICE, (16,), warps=4) for kernel in (jit, second)]
    launches = [kernel_launch.Launch(form, (n, 1, 1), (10 * n,)) for n, form in enumerate(forms, 1)]
    chain = kernel_launch.Chain(DEVICE, "abc", (launches[0], "ac"), (launches[1], "bca"))
    order = []
    for _ in range(3):
        a, b, c = (torch.zeros(8) for _ in range(3))
        order.append((a, b, c))
        chain((a, b, c))
    assert [args for _, args, _ in jit.compilations] == [(order[0][0], order[0][2], 10, 16)]
    assert jit.forms[0].calls == [((1, 1, 1), (a.data_ptr(), c.data_ptr(), 10, 16)) for a, _, c in order[1:]]
    assert second.forms[0].calls == [
        ((2, 1, 1), (b.data_ptr(), c.data_ptr(), a.data_ptr(), 20, 16)) for a, b, c in order[1:]
    ]


def test_a_chain_compiles_anew_only_what_reads_a_tensor_at_an_odd_address(jit):
    second = Jit()
    forms = [kernel_launch.Kernel(kernel).form(DEVICE, (16,), warps=4) for kernel in (jit, second)]
    launches = [kernel_launch.Launch(form, (1, 1, 1), ()) for form in forms]
    chain = kernel_launch.Chain(DEVICE, "abc", (launches[0], "ab"), (launches[1], "ac"))
    a, b, c = (torch.zeros(8) for _ in range(3))
    for tensors in ((a, b, c), (a, b[1:], c), (a, b[1:], c)):
        chain(tensors)
    assert (len(jit.compilations), len(second.compilations)) == (2, 1)
    assert jit.forms[1].calls == [((1, 1, 1), (a.data_ptr(), b[1:].data_ptr(), 16))]
    assert len(second.forms[0].calls) == 2


def test_a_chain_that_another_thread_is_binding_launches_all_its_kernels(jit, monkeypatch):
    second = Jit()
    forms = [kernel_launch.Kernel(kernel).form(DEVICE, (16,), warps=4) for kernel in (jit, second)]
    chain = kernel_launch.Chain(DEVICE, "ab", *((kernel_launch.Launch(form, (1, 1, 1), ()), "ab") for form in forms))
    tensors, bound, met = (torch.zeros(8), torch.zeros(8)), kernel_launch.Form.bound, []

    def meeting(form, *args):
        if form is forms[1] and not met:
            met.append(form)
            thread = threading.Thread(target=chain, args=(tensors,))
            thread.start()
            thread.join()
        return bound(form, *args)

    monkeypatch.setattr(kernel_launch.Form, "bound", meeting)
    chain(tensors)
    assert met and len(jit.forms[0].calls) == len(second.forms[0].calls) == 1


def test_a_repeated_launch_passes_the_addresses_of_each_call(jit, monkeypatch):
    monkeypatch.setattr(repeated, "current_device", lambda: None)
    monkeypatch.setattr(repeated, "MOST", 2)
    form, shared = kernel_launch.Kernel(jit).form(DEVICE, (16,), warps=4), torch.zeros(8)
    launch = kernel_launch.Launch(form, (2, 1, 1), (3,))
    again = repeated.Repeated(DEVICE, launch, kernel_launch.Kept((shared,)))
    tensors = [torch.zeros(8) for _ in range(3)]
    odd = tensors[0][1:]  # for which the kernel is compiled anew
    order = [tensors[0], tensors[0], odd, odd, tensors[1], tensors[2], tensors[0], tensors[0]]
    for x in order:
        again((x,))
    assert len(jit.compilations) == 2
    called = [((2, 1, 1), (x.data_ptr(), shared.data_ptr(), 3, 16)) for x in order]
    assert jit.forms[0].calls == [called[1], *called[4:]] and jit.forms[1].calls == [called[3]]


def test_a_recorder_is_told_of_repeated_launches(jit, monkeypatch):
    monkeypatch.setattr(repeated, "current_device", lambda: None)
    form, told = kernel_launch.Kernel(jit).form(DEVICE, (16,), warps=4), []
    again = repeated.Repeated(DEVICE, kernel_launch.Launch(form, (1, 1, 1), ()), kernel_launch.NONE)
    x = torch.zeros(8)
    again((x,))
    recorder = SimpleNamespace(launched=lambda start, grid, args: told.append((grid, args)))
    monkeypatch.setitem(kernel_launch.recorders, threading.get_ident(), recorder)
    again((x,))
    assert told == [((1, 1, 1), (x, 16))]


def test_a_number_that_outgrows_its_32_bits_is_compiled_for_anew(jit, monkeypatch):
    form = kernel_launch.Kernel(jit).form(DEVICE, (16,), warps=4)
    x = torch.zeros(8)
    form((1, 1, 1), (x,), (3,))
    form((1, 1, 1), (x,), (2**31 + 5,))
    monkeypatch.setattr(Jit, "wide", jit.forms[-1])
    form((1, 1, 1), (x,), (2**31 + 9,))
    assert [args[1] for _, args, _ in jit.compilations] == [3, 2**31 + 5]
    assert [args[1] for _, args in jit.forms[-1].calls] == [2**31 + 9]


def test_a_launcher_compiles_once_for_a_key(jit):
    launch, x = kernel_launch.Launcher(jit), torch.zeros(8)
    for key, count in (("a", 1), ("a", 2), ("b", 3), ("a", 4)):
        launch(DEVICE, key, (count, 1, 1), (x, count), num_warps=2)
    assert [grid[0] for grid, _, _ in jit.compilations] == [1, 3]
    assert [grid[0] for grid, _ in jit.forms[0].calls] == [2, 4]


def test_dtype_alignment_constants_and_warps_make_new_forms(jit):
    kernel = kernel_launch.Kernel(jit)
    x, y = torch.zeros(8), torch.zeros(8)
    variants = [
        ((x, y), (16,), 4),
        ((x.half(), y), (16,), 4),
        ((x, y), (32,), 4),
        ((x, y), (16,), 8),
        ((x[1:], y), (16,), 4),
        ((x, y[1:]), (16,), 4),
    ]
    for _ in range(2):
        for pointers, fixed, warps in variants:
            kernel(DEVICE, (1, 1, 1), pointers, (), fixed, warps=warps)
    assert len(jit.compilations) == len(variants)
    assert all(len(form.calls) == 1 for form in jit.forms)


def test_an_empty_grid_is_no_launch(jit):
    kernel_launch.Kernel(jit)(DEVICE, (0, 1, 1), (torch.zeros(1),), (), (), warps=1)
    assert not jit.compilations


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(NVCC.__dict__, "state", (False, "no CUDA compiler (nvcc) on PATH or under CUDA_HOME"))
    source = tmp_path / "absent.cu"
    source.write_text("")
    with pytest.raises(OperatorUnavailable, match=r"absent.cu must be compiled: no CUDA compiler \(nvcc\)"):
        nvcc.library(source, (9, 0))


needs_nvcc = pytest.mark.skipif(not NVCC.state[0], reason="needs nvcc")


@needs_nvcc
def test_a_source_is_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "answer.cu"
    source.write_text('extern "C" int answer() { return 42; }')
    assert nvcc.library(source, (9, 0)).answer() == 42
    kept = list((tmp_path / "cache" / "cuda").iterdir())
    assert [path.suffix for path in kept] == [".so"]
    before = kept[0].stat().st_mtime_ns
    nvcc.library.cache_clear()
    assert nvcc.library(source, (9, 0)).answer() == 42
    assert kept[0].stat().st_mtime_ns == before


@needs_nvcc
def test_a_refused_source_shows_the_compilers_words(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path))
    source = tmp_path / "broken.cu"
    source.write_text("int broken( {")
    with pytest.raises(RuntimeError, match=r"(?s)cannot compile .*broken.cu.*error"):
        nvcc.library(source, (9, 0))


@needs_nvcc
def test_the_convolution_compiles_for_hopper(monkeypatch, tmp_path):
    from shardwise.ops.mamba import conv_cuda

    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path))
    compiled = nvcc.library.__wrapped__(conv_cuda.Path(conv_cuda.__file__).with_name("conv.cu"), (9, 0))
    assert compiled.shardwise_causal_conv
