"""Which GPUs may have peer memory, who is told why not, and when it is given back. Memory is a stand-in."""

import importlib.util

import numpy
import pytest
import torch

from shardwise.comm.base import CollectiveTimeout
from shardwise.comm.p2p import cuda
from shardwise.comm.p2p.workspace import ONE_SHOT, RECORDS, Workspace


def workspace(device: int = 0) -> Workspace:
    made = Workspace.__new__(Workspace)
    made.device, made.rank, made.ranks = device, 0, (0, 1)
    made.failure, made._base, made._opened = None, 1 << 20, {}
    made._seen = numpy.zeros(2 * RECORDS, dtype=numpy.int64)
    return made


def test_memory_that_a_late_rank_may_still_write_is_kept(monkeypatch):
    """Also where nobody had asked whether a wait gave up, as after a graph's replay."""
    freed = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda, "free", lambda address, device: freed.append(address))
    late = workspace()
    late._seen[1] = 7 | ONE_SHOT << 32
    late.close()
    assert freed == []
    with pytest.raises(CollectiveTimeout, match="call 7 .* never received rank 1's data"):
        late.check()
    workspace().close()
    assert freed == [1 << 20]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_a_gpu_that_lacks_instructions_or_room_for_blocks_is_refused(monkeypatch, capability):
    """The group beneath then serves: a launch would not compile, or wait for blocks that never start."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda, "malloc", lambda size, device: pytest.fail("memory is allocated"))
    made = workspace()
    made.size, made.region_bytes = 2, 1 << 20
    with pytest.raises(ValueError, match="the kernels are built for 9.x and 10.x"):
        made._allocate()
