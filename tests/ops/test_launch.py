"""Cached launches: what makes a new compiled form, and what the compiled form is called with."""

import pytest
import torch

from shardwise.ops import nvcc, triton_support
from shardwise.ops.registry import NVCC, OperatorUnavailable

DEVICE = torch.device("cpu")


class Compiled:
    """A compiled kernel that notes its launches."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, args))


class Jit:
    """A kernel that notes its compilations."""

    def __init__(self):
        self.compilations, self.forms = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.compilations.append((grid, args, options))
            self.forms.append(Compiled())
            return self.forms[-1]

        return run


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.setattr(triton_support, "_INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return Jit()


def test_equal_launches_compile_once_and_pass_addresses(jit):
    kernel = triton_support.Kernel(jit)
    x = torch.zeros(8)
    kernel(DEVICE, (2, 1, 1), (x,), (3, 0.5), (16, True), warps=4, pdl=True)
    kernel(DEVICE, (5, 1, 1), (x,), (7, 1.5), (16, True), warps=4, pdl=True)
    assert jit.compilations == [
        ((2, 1, 1), (x, 3, 0.5, 16, True), {"num_warps": 4, "num_stages": 2, "launch_pdl": True})
    ]
    assert jit.forms[0].calls == [((5, 1, 1), (x.data_ptr(), 7, 1.5, 16, True))]


def test_dtype_alignment_constants_and_warps_make_new_forms(jit):
    kernel = triton_support.Kernel(jit)
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
    triton_support.Kernel(jit)(DEVICE, (0, 1, 1), (torch.zeros(1),), (), (), warps=1)
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
