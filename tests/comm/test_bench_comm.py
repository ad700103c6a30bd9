"""`shardwise bench comm`: rows, table, peers, topology file."""

import argparse
import json

import pytest
import torch

from shardwise.comm import bench, bench_cases, names
from shardwise.comm.rank import current_groups
from shardwise.launch.cli import bench_comm, main
from shardwise.parallel.host_memory import host_memory
from shardwise.sharding import topology
from shardwise.testing import run_threads

LABELS = {"op", "bytes", "dtype", "world", "transport", "strategy"}
FIGURES = {"p50_us", "p99_us", "algbw_gbps", "busbw_gbps", "wrong"}


def test_rows_stand_beside_their_peers_in_one_run(tmp_path, capsys):
    file, calibrated = tmp_path / "rows.json", tmp_path / "topology.json"
    words = ["bench", "comm", "--world", "2", "--sizes", "4KiB,64KiB", "--device", "cpu", "--why"]
    assert main([*words, "--json", str(file), "--calibrate", str(calibrated)]) == 0
    document = json.loads(file.read_text())
    rows = document["rows"]
    assert [(row["transport"], row["bytes"]) for row in rows] == [
        (transport, size) for transport in ("shm", "peer:gloo", "peer:mpi") for size in (4096, 65536)
    ]
    for row in rows:
        assert set(row) == LABELS | FIGURES
        assert row["wrong"] == 0 and 0 < row["p50_us"] <= row["p99_us"]
        assert row["busbw_gbps"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3)
    assert document["machine"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "busbw" in printed and "peer:mpi" in printed and "ONESHOT: every rank sums all" in printed
    assert "strategy TWOSHOT: runs" in printed and "strategy SYMM_MEM: not on transport shm" in printed
    assert "strategy UB: user buffers reduce through NVLS" in printed
    machine, (_, total) = topology.load(str(calibrated)), host_memory()
    assert machine.device.memory_bytes == total // 2
    link = machine.intra
    assert link.latency_seconds == pytest.approx(min(row["p50_us"] for row in rows[:2]) * 1e-6)


def test_json_on_standard_output_is_nothing_but_json(capfd):
    words = ["bench", "comm", "--sizes", "1KiB", "--peers", "none", "--device", "cpu", "--op", "all", "--json"]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["op"] for row in rows] == list(names.OPS)
    assert not any(row["wrong"] for row in rows)
    assert {row["op"]: row["bytes"] for row in rows if row["bytes"] != 1024} == {
        "all_reduce_residual_rms_norm": 2 * bench_cases.HIDDEN
    }, "a row says what was moved: of a norm, a row of its tensor at least"


@pytest.mark.parametrize("size, moved", [(1, 12), (13, 12), (24, 24), (35, 24)])
def test_rows_tell_the_bytes_that_were_moved(size, moved):
    row = bench.row("all_reduce", size, torch.float32, 3, "shm", "AUTO", [2.0] * 3, 0)
    assert (row.bytes, row.algbw_gbps) == (moved, moved / 2e3)


def test_all_operations_are_all_beside_others_too(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_comm, "_measure", lambda body, payload, *_: asked.append(payload["ops"]) or ([], [], []))
    assert main(["bench", "comm", "--op", "all_gather,all", "--device", "cpu", "--peers", "none"]) == 0
    assert asked == [list(names.OPS)]


def test_wrong_results_are_counted():
    def body():
        group = current_groups().world
        case = bench_cases.make_case("all_reduce", 64, torch.float32, group, "cpu", "AUTO")
        spoiled = bench_cases.Case(case.call, lambda: case.verify() + (torch.arange(16) < 3), case.expected)
        return bench.measure(spoiled, "all_reduce", 64, torch.float32, group, "threads", "AUTO").wrong

    assert run_threads(2, body) == [3, 3]


def test_the_slowest_rank_stands_for_all():
    row = {"p50_us": 1.0, "p99_us": 9.0, "wrong": 1, "bytes": 8}
    slow = {"p50_us": 2.0, "p99_us": 3.0, "wrong": 4, "bytes": 8}
    assert bench_comm.merge([[row], [slow]]) == [{"p50_us": 2.0, "p99_us": 9.0, "wrong": 5, "bytes": 8}]


def test_sizes_are_read_with_their_units():
    assert bench_comm.sizes("4KiB, 1.5MiB,7,2GB") == [4096, 1572864, 7, 2 * 10**9]
    with pytest.raises(argparse.ArgumentTypeError, match="'4 potatoes'"):
        bench_comm.sizes("1KiB,4 potatoes")


@pytest.mark.parametrize(
    "words",
    [["--op", "all_shuffle"], ["--transport", "nope"], ["--strategy", "FASTEST"], ["--peers", "me"]],
)
def test_bad_words_are_usage_errors(words, capsys):
    assert main(["bench", "comm", *words]) == 2
    assert words[1] in capsys.readouterr().err


def test_bus_bandwidth_counts_what_a_rank_must_send():
    assert bench.bus_factor("all_reduce", 2) == 1.0
    assert bench.bus_factor("all_reduce_residual_rms_norm", 4) == 1.5
    assert bench.bus_factor("all_gather", 4) == 0.75
    assert bench.bus_factor("broadcast", 4) == 1.0
