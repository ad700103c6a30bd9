"""Benchmark programs start: they import what they need and explain their options. What they measure is theirs."""

import importlib
import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from shardwise.ops.registry import operators

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_benchmark_explains_its_options(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.startswith("usage: ") and path.name in out


def test_loading_is_measured_beside_cat_on_files_of_a_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    words = ["--shape", str(tmp_path / "shape.json"), "--gigabytes", "0.005", "--folder", str(tmp_path), "--tp", "1"]
    command = [sys.executable, str(FOLDER / "load_weights.py"), *words, "--rounds", "1", "--cached"]
    done = subprocess.run([*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    (one,) = result["rounds"]
    assert 4e6 < result["bytes"] < 6e6 and one["resident_before"] == 1 and one["cat_seconds"] > 0
    assert sum(rank["shard_bytes"] for rank in one["ranks"]["1"]) >= result["bytes"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [], "its files are gone"


def test_every_reference_operator_has_its_host_time_beside_pytorchs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    formulas, host_time = (importlib.import_module(name) for name in ("host_time_formulas", "host_time"))
    rows = partial(formulas.formula_rows, "cpu")
    table = host_time.least_times(host_time.made({"formulas": rows}), None, turns=1, rounds=1)
    own = [info.name for info in operators() if info.backend == "torch" and info.category != "distributed"]
    measured = [row["call"].partition(",")[0] for row in table]
    assert sorted([*measured, *formulas.OF_RANKS, *formulas.OF_KERNELS]) == sorted(own)
    for row in table:
        assert row["beyond_us"] == row["host_us"]["call"] - row["host_us"]["direct"]


def test_rows_that_raise_are_told_and_the_others_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    host_time = importlib.import_module("host_time")
    Row, Later, failures = host_time.Row, host_time.Later, {}

    def broken():
        yield Later("not made", partial(int, "none"))
        yield Row("fine", list)
        yield Row("not called", partial(int, "none"))
        raise ValueError("no more of them")

    rows = host_time.made({"broken": broken, "whole": lambda: [Row("fine too", dict)]}, failures)
    table = host_time.least_times(rows, None, turns=2, rounds=1, failures=failures)
    assert [row["call"] for row in table] == ["fine", "fine too"]
    assert list(failures) == ["not made", "the rest of group broken", "not called"]
    assert failures["the rest of group broken"] == "ValueError: no more of them"
    with pytest.raises(ValueError, match="none"):
        host_time.least_times(rows, None, turns=1, rounds=1)


def test_operators_of_several_ranks_are_timed_on_ranks(tmp_path):
    command = [sys.executable, str(FOLDER / "ops_host_ranks.py"), "--device", "cpu", "--turns", "1", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    own = {info.name for info in operators() if info.category == "distributed"} | {"sharded_rmsnorm"}
    assert {row["call"].partition(",")[0] for row in result["rows"]} == own
    assert result["ranks"] == 2 and result["group"].startswith("group world of 2")
    for row in result["rows"]:
        assert row["host_us"]["direct"] > 0 and row["beyond_us"] == row["host_us"]["call"] - row["host_us"]["direct"]
