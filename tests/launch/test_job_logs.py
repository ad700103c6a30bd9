"""Where jobs leave their logs, each its own, and what a job cannot be."""

import tempfile

import pytest

from shardwise.comm.bootstrap import store_from_environment
from shardwise.comm.rank import RankInfo
from shardwise.launch.job import Job
from shardwise.launch.start import run_job


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    folder = tmp_path / "logs"
    monkeypatch.setenv("SHARDWISE_LOG_DIR", str(folder))
    return folder


def started() -> Job:
    job = Job(target="a:b", payload={}, world=1)
    job.prepare()
    job.log(0).write_text("words")
    (job.logs / "failure.json").write_text("{}")
    return job


def test_a_second_job_gets_a_folder_of_its_own_inside(chosen):
    first, second = started(), started()
    assert first.logs == chosen and second.logs.parent == chosen
    third = started()
    assert len({first.logs, second.logs, third.logs}) == 3
    for job in (first, second, third):
        assert job.log(0).read_text() == "words" and (job.logs / "failure.json").exists()
        job.clean(failed=False)
        assert job.log(0).exists()


def test_the_next_job_clears_what_the_last_one_reported(chosen):
    first = started()
    first.clean(failed=True)
    assert (chosen / "failure.json").exists()
    second = Job(target="a:b", payload={}, world=1)
    second.prepare()
    assert second.logs == chosen and not list(chosen.glob("failure*")) and not list(chosen.glob("rank-*"))
    second.clean(failed=False)


def test_of_a_job_that_failed_the_logs_alone_stay(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARDWISE_LOG_DIR", raising=False)
    job = Job(target="a:b", payload={}, world=1, folder=tmp_path)
    job.prepare()
    job.write({})
    for folder in (job.store, job.launcher_folder / "attempt_0"):
        folder.mkdir(parents=True)
    job.clean(failed=True)
    assert list(tmp_path.iterdir()) == [job.logs]


def test_a_torchrun_that_announces_no_port_is_told_what_to_change():
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(ValueError, match="MASTER_PORT=0 names no port to meet at: start torchrun with --standalone"):
        store_from_environment(RankInfo(0, 2, 0, 2), 1.0, environ)


def test_a_folder_that_cannot_be_made_is_named_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARDWISE_LOG_DIR", str(tmp_path / "file" / "logs"))
    with pytest.raises(ValueError, match="^SHARDWISE_LOG_DIR .*/file/logs: no folder can be made there: Not a dir"):
        Job(target="a:b", payload={}, world=1).prepare()


@pytest.mark.parametrize(
    "target, payload, error, words",
    [
        ("package.function", {}, ValueError, "job target 'package.function': name a function as package.module:func"),
        (":function", {}, ValueError, "name a function as package.module:function"),
        (5, {}, TypeError, "target is 5, expected a text like package.module:function"),
        ("a:b", {"sizes": {1, 2}}, TypeError, "payload of job a:b: Object of type set .*; legal: numbers, texts"),
        ("a:b", [1], TypeError, r"payload is \[1\], expected a dict of JSON values"),
    ],
)
def test_a_job_of_another_form_is_refused_before_ranks_start(target, payload, error, words):
    with pytest.raises(error, match=words):
        run_job(target, payload, world=2)


@pytest.mark.parametrize(
    "name, value, error, words",
    [
        ("world", "2", TypeError, "world is '2', expected a whole number of ranks"),
        ("world", 2.0, TypeError, "world is 2.0, expected a whole number"),
        ("world", True, TypeError, "world is True, expected a whole number"),
        ("launcher", None, ValueError, "unknown launcher 'None'; legal: local, torchrun, mpi, ray"),
        ("options", 5, TypeError, "options is 5, expected a dict of the launcher's options"),
        ("options", {"address": "auto"}, TypeError, "launcher local has no option 'address'; legal: none"),
        ("environment", {"A": 1}, TypeError, "environment has 'A': 1, expected texts"),
        ("environment", {"A=B": "x"}, ValueError, "environment has 'A=B': 'x', which no variable can be"),
        ("on_event", 5, TypeError, "on_event is 5, expected a function of one event"),
        ("deadline", "3", TypeError, "deadline is '3', expected a number of seconds"),
        ("deadline", 0, ValueError, "deadline is 0: give seconds above 0, at most 1000000, or None for no bo"),
        ("deadline", 1e9, ValueError, "deadline is 1000000000.0: give seconds above 0, at most 1000000"),
    ],
)
def test_an_argument_that_no_job_can_have_is_one_sentence_at_the_door(monkeypatch, name, value, error, words):
    monkeypatch.setattr("shardwise.launch.start.Job", None)
    with pytest.raises(error, match=f"^{words}"):
        run_job("a:b", **{"world": 2, name: value})


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"adress": "auto"}, TypeError, "launcher ray has no option 'adress'; legal: address, device"),
        ({"address": 5}, TypeError, "the Ray address is 5, expected a text such as auto or HOST:PORT"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is unknown, legal: auto, cpu, cuda"),
    ],
)
def test_options_of_ray_are_looked_at_before_it_starts(options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        run_job("a:b", world=2, launcher="ray", options=options)


@pytest.mark.parametrize(
    "launcher, world, words",
    [("warp", 2, "unknown launcher 'warp'"), ("local", 0, "world is 0: a job has at least one")],
)
def test_a_job_that_is_refused_leaves_no_folder(tmp_path, monkeypatch, launcher, world, words):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        run_job("a:b", world=world, launcher=launcher)
    assert list(tmp_path.iterdir()) == []
