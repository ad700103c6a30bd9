"""Ranks that these tests start run on the CPU, also on a machine with fewer GPUs than they have ranks."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def no_gpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def with_gpus(monkeypatch):
    """For tests with the marker gpu."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
