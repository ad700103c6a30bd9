"""What is known of this machine: mpirun's flavours, doctor's report, the loading bar."""

import io
import json
import subprocess
from itertools import count
from types import SimpleNamespace

import pytest

from shardwise.launch import doctor, mpi
from shardwise.launch.backend import signed
from shardwise.launch.cli import main
from shardwise.launch.mpi import Mpi, parse_version
from shardwise.launch.postmortem import spell
from shardwise.launch.progress import LoadProgress
from shardwise.launch.torchrun import Torchrun

HYDRA = "HYDRA build details:\n    Version:                                 4.2.0\n"


@pytest.mark.parametrize(
    "text, world, flags",
    [
        ("mpirun (Open MPI) 5.0.11\n", 4, ["-n", "4", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]),
        ("mpirun (Open MPI) 5.0.11\n", 2, ["-n", "2", "--bind-to", "none"]),
        (
            "mpirun (Open MPI) 4.1.6\n",
            4,
            ["-n", "4", "--bind-to", "none", "--mca", "plm", "isolated", "--oversubscribe"],
        ),
        (HYDRA, 4, ["-n", "4", "-bind-to", "none"]),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build", 2, ["-n", "2", "-bind-to", "none"]),
    ],
)
def test_each_mpirun_gets_the_flags_that_it_understands(text, world, flags):
    assert parse_version("/bin/mpirun", text).flags(world, slots=2, environ={}) == flags


def test_the_users_own_way_of_starting_ranks_stays():
    flags = parse_version("/bin/mpirun", "mpirun (Open MPI) 4.1.6\n").flags(2, 2, {"OMPI_MCA_plm": "rsh"})
    assert flags == ["-n", "2", "--bind-to", "none"]


def test_an_unknown_mpirun_is_refused():
    with pytest.raises(ValueError, match="neither Open MPI nor MPICH: something else"):
        parse_version("/bin/mpirun", "something else")


OPEN_MPI_5_EXIT = "The first process to do so was:\n\n   Process name: [prterun-vm-7682@1,1]\n   Exit code:    3\n"
OPEN_MPI_SIGNAL = "prterun noticed that process rank 1 with PID 12 on node vm exited on\nsignal 9 (Killed)."
TORCHRUN = """
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
"""


def test_the_launchers_own_words_name_the_culprit():
    assert Mpi().blame(OPEN_MPI_5_EXIT) == {1: 3}
    assert Mpi().blame(OPEN_MPI_SIGNAL) == {1: -9}
    assert Torchrun().blame(TORCHRUN) == {1: -9}
    assert Mpi().blame("") == Torchrun().blame("") == {}


def test_exit_codes_above_128_are_signals():
    assert [signed(code) for code in (0, 5, 128, 137, 139, 255)] == [0, 5, 128, -9, -11, 255]


def test_any_exit_code_has_words():
    assert [spell(signed(code)) for code in (137, 170)] == ["killed by SIGKILL", "killed by signal 42"]
    assert all(spell(code) for code in range(-64, 256))


def test_an_mpirun_that_does_not_answer_is_one_that_is_not_known(monkeypatch):
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(mpi, "subprocess", SimpleNamespace(run=hangs, TimeoutExpired=subprocess.TimeoutExpired))
    with pytest.raises(ValueError, match="--version gave no answer in 30 s"):
        mpi.find()
    assert "gave no answer" in doctor._mpirun().value
    assert "gave no answer" in doctor._mpi()[-1].value


def test_doctor_finds_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["problems"] == 0
    assert {"python", "cores", "/dev/shm", "open files", "torch", "mpirun", "build", "here"} <= found.keys()
    assert "Open MPI" in found["mpirun"]["value"] and "Open MPI" in found["library of mpi4py"]["value"]


def test_a_probe_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "PROBES", (("system", broken),))
    (finding,) = doctor.examine()
    assert (finding.state, finding.value) == (doctor.WARNING, "OSError: no such thing")


def test_mixed_mpi_libraries_are_a_problem(monkeypatch):
    monkeypatch.setattr("shardwise.launch.mpi.find", lambda: parse_version("/bin/mpirun", HYDRA))
    (finding,) = doctor._mpi()
    assert finding.state == doctor.PROBLEM and "install one MPI only" in (finding.advice or "")


def test_quick_loading_is_one_line_when_nobody_watches():
    stream = io.StringIO()
    with LoadProgress(stream) as progress:
        for done in range(0, 2001, 100):
            progress.update(done, 2000)
    assert [line.split(" %")[0] for line in stream.getvalue().splitlines()] == ["loading 100"]


def test_slow_loading_is_one_line_a_tenth(monkeypatch):
    monkeypatch.setattr("shardwise.launch.progress.time", SimpleNamespace(perf_counter=count(step=1.0).__next__))
    stream = io.StringIO()
    with LoadProgress(stream) as progress:
        for done in range(0, 2001, 7):
            progress.update(min(done, 2000), 2000)
        progress.update(2000, 2000)
    lines = stream.getvalue().splitlines()
    assert [line.split(" %")[0] for line in lines] == [f"loading {tenth}" for tenth in range(10, 101, 10)]


def test_ranks_other_than_0_show_no_progress():
    stream = io.StringIO()
    with LoadProgress(stream, enabled=False) as progress:
        progress.update(1, 1)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with LoadProgress(stream) as progress:
        progress.update(1_000_000, 2_000_000)
    assert "loading" in stream.getvalue() and "MB" in stream.getvalue()
