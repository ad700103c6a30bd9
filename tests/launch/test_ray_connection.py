"""Which Ray cluster a job takes."""

import pytest

from shardwise.launch.ray import Ray


class Recorder:
    """Stands for the package ray: remembers how it was started."""

    def init(self, address, **options):
        self.address, self.options = address, options


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Recorder()


def test_without_an_address_the_job_has_a_cluster_of_its_own_whatever_else_runs_here(recorder):
    Ray()._connect(recorder, 3)
    assert recorder.address == "local" and recorder.options["num_cpus"] >= 3


def test_an_address_is_that_of_the_option_or_of_the_environment(recorder, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    Ray()._connect(recorder, 3)
    assert recorder.address == "auto" and "num_cpus" not in recorder.options
    monkeypatch.setattr("shardwise.launch.ray._knock", lambda address: None)
    Ray("here:1")._connect(recorder, 3)
    assert recorder.address == "here:1"
