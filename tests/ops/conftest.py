"""Fixtures of the operator tests."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch


@pytest.fixture
def much_memory():
    """A test that takes many gigabytes of the device: one at a time, also where several workers share it."""
    with (Path(tempfile.gettempdir()) / "shardwise-much-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()
