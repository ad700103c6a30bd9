"""NVLink multicast is switched off before torch is imported, in every rank of every launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_watch import SWITCHES

from shardwise.launch import env
from shardwise.launch.start import run_job

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def search_path(tmp_path, monkeypatch) -> str:
    """A PYTHONPATH by which every Python watches its import of torch, without the switches in the environment."""
    (tmp_path / "sitecustomize.py").write_text("import torch_watch\n")
    for switch in SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    return os.pathsep.join(map(str, (tmp_path, HERE, ROOT)))


@pytest.mark.parametrize("launcher", ["local", "torchrun", "mpi", "ray"])
def test_ranks_that_we_start_import_torch_behind_the_switches(search_path, launcher):
    if launcher == "ray":
        pytest.importorskip("ray")
    environment = {"PYTHONPATH": search_path}
    for rank in run_job("torch_watch:import_torch", world=2, launcher=launcher, environment=environment):
        assert rank["watched"] and rank["torch"] and not rank["imported before"]


def test_ranks_of_the_users_own_launcher_do_too(search_path):
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", "run", "smollm2", "--max-new-tokens", "1"],
        env={**os.environ, **place, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def test_the_watch_would_tell(search_path):
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1 and "AssertionError: torch is imported by" in done.stderr


def test_the_switches_are_these():
    assert env.NO_MULTICAST == SWITCHES
