"""Benchmark cases, at tiny sizes: what they time runs, moves the bytes it says, and the rows are complete."""

import os
import sys
import types

import pytest
import torch

from shardwise.launch.cli import bench_ops
from shardwise.ops import operators
from shardwise.ops.bench import cases, measure, quantized, states

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
HERE = {info.name for info in operators() if info.availability()[0] and all(need.on_cpu() for need in info.needs)}
SHAPE = (4, 16, 16, 2)
CASES = {
    "norms": lambda: cases.norm_cases((2,), (64,)),
    "rope": lambda: cases.rope_cases((3,), 4, 2, 16),
    "conv": lambda: states.conv_cases((2,), (5,), 32),
    "ssm decode": lambda: states.ssm_decode_cases((2,), {"small": SHAPE}),
    "ssm prefill": lambda: states.ssm_prefill_cases((9,), SHAPE),
    "delta": lambda: states.delta_cases((5,), (2,), 2, 16),
    "fp8": lambda: quantized.fp8_linear_cases((2,), ((16, 32),)),
}


@pytest.fixture(autouse=True)
def on_cpu_beside_silent_peers(monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    names = ("flashinfer.norm", "flashinfer.rope", "flashinfer.mamba", "fla.ops.delta_rule", "fla.ops.gated_delta_rule")
    for name in ("flashinfer", "fla", "fla.ops", "fla.ops.simple_gla", *names):
        module = types.ModuleType(name)
        module.__getattr__ = lambda attribute: lambda *args, **kwargs: None
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("device_microseconds", "host_microseconds"):
        monkeypatch.setattr(measure, name, lambda call, **_options: call() is None or 2.0)
    monkeypatch.setattr(measure, "copy_microseconds", lambda moved: 1.0)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_that_can_run_here_are_measured(name, capsys):
    made = list(CASES[name]())
    known = {info.name for info in operators()}
    assert made and all(case.operator in known for case in made)
    runnable = [case for case in made if case.operator in HERE]
    rows = bench_ops._measure(runnable, name, sys.stdout)
    printed = capsys.readouterr().out
    for case, row in zip(runnable, rows, strict=True):
        assert row["bytes"] == case.moved_bytes > 0 and case.operator in printed
        assert set(row["peers_us"]) == set(case.peers)


def test_moved_bytes_count_what_must_be_read_and_written():
    by_name = {case.operator: case for case in cases.norm_cases((3,), (64,))}
    once = 3 * 64 * torch.finfo(torch.bfloat16).bits // 8
    assert by_name["triton_rms_norm"].moved_bytes == 2 * once
    assert by_name["triton_rmsnorm_gated"].moved_bytes == 3 * once
    assert by_name["flashinfer_fused_add_rms_norm_inplace"].moved_bytes == 4 * once


def test_host_times_are_taken_on_one_core_which_is_let_go_again():
    before, seen = os.sched_getaffinity(0), []

    def call():
        seen.append(os.sched_getaffinity(0))

    times = measure.alternating_host_microseconds({"one": call, "other": call}, calls=2, rounds=1)
    assert set(times) == {"one", "other"} and all(0 < time < 1e6 for time in times.values())
    assert len(seen) == 8 and all(len(cores) == 1 and cores == seen[0] for cores in seen)
    with pytest.raises(ZeroDivisionError):
        measure.alternating_host_microseconds({"fails": lambda: 1 / 0})
    assert os.sched_getaffinity(0) == before
