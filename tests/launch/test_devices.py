"""Which device a rank takes, and what it says when there are too few."""

from pathlib import Path

import pytest
import torch

from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.strategy import require_own_devices
from shardwise.launch.session import choose_device
from shardwise.parallel.options import NotOffered
from shardwise.testing import run_threads

RANK = RankInfo(rank=5, world=8, local_rank=1, local_world=4, node=1)


@pytest.fixture
def devices(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def show(count: int) -> list:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return chosen

    return show


def test_every_rank_of_a_host_takes_the_device_of_its_local_number(devices):
    chosen = devices(4)
    assert choose_device("auto", RANK) == choose_device("cuda", RANK) == "cuda:1"
    assert chosen == ["cuda:1", "cuda:1"]


def test_a_rank_that_is_shown_one_device_takes_it(devices):
    devices(1)
    assert choose_device("auto", RANK) == "cuda:0"


def test_without_devices_auto_is_the_cpu_and_cuda_an_error(devices):
    devices(0)
    assert choose_device("auto", RANK) == choose_device("cpu", RANK) == "cpu"
    with pytest.raises(NotOffered, match="device cuda: no CUDA device is visible to this rank; legal here: cpu"):
        choose_device("cuda", RANK)


def test_the_cpu_is_taken_where_it_is_asked_for(devices):
    chosen = devices(4)
    assert choose_device("cpu", RANK) == "cpu" and chosen == []
    with pytest.raises(ValueError, match="device 'tpu' is unknown, legal: auto, cpu, cuda"):
        choose_device("tpu", RANK)


def test_ranks_that_would_share_a_device_are_told_what_to_change():
    def rank():
        group = current_groups().world
        require_own_devices(group, f"GPU-{group.rank}")
        with pytest.raises(ValueError) as raised:
            require_own_devices(group, f"GPU-{group.rank % 2}")
        return str(raised.value)

    texts = run_threads(3, rank)
    assert len(set(texts)) == 1
    assert "ranks 0 and 2 would share one CUDA device" in texts[0] and "has 3 ranks and shows them 2" in texts[0]
    assert all(way in texts[0] for way in ("--tp", "CUDA_VISIBLE_DEVICES", "--device cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_ranks_than_devices_are_one_sentence(with_gpus, capfd):
    from shardwise.launch.cli import main

    world = torch.cuda.device_count() + 1
    shape = Path(__file__).parents[2] / "benchmarks" / "shapes" / "llama-3.1-8b.json"
    assert main(["bench", "generate", "--shape", str(shape), "--dummy-weights", "--tp", str(world)]) == 1
    err = capfd.readouterr().err
    assert "would share one CUDA device" in err and "Traceback" not in err
