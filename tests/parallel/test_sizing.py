"""Weights that a device has no room for are refused before they are read."""

import pytest
from families import FAMILIES, NEAR_KIN
from tiny import write

from shardwise.comm.rank import current_groups
from shardwise.parallel.engine import Engine
from shardwise.parallel.sizing import require_memory, weight_bytes
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

GIB = 2**30


@pytest.mark.parametrize("name", ["llama", "llama tied, biased, scaled rope", "gpt_oss", "glm4_moe", "gemma2"])
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, moe_ep=2)], ids=str)
def test_the_weights_take_what_was_foretold(tmp_path, name, layout):
    model_type, fields = {**FAMILIES, **NEAR_KIN}[name]
    folder = write(tmp_path, model_type, **fields)
    made = plan(folder, layout) if "moe" in name or "oss" in name else plan(folder, ParallelLayout(tp=layout.tp))
    loaded = run_threads(
        made.layout.world, lambda: Engine(folder, made, current_groups()).stats().weight_bytes, layout=made.layout
    )
    for rank, held in enumerate(loaded):
        assert 0.9 * held < weight_bytes(made, rank, 4, packs_mxfp4=False) < 1.01 * held


def test_every_rank_refuses_when_one_has_too_little():
    def rank():
        world = current_groups().world
        with pytest.raises(ValueError) as caught:
            require_memory(3 * GIB, "their weights", memory=((4 - world.rank * 2) * GIB, 8 * GIB), world=world)
        return str(caught.value)

    first, second = run_threads(2, rank)
    assert first == second
    assert first.startswith(
        "1 of 2 ranks have no memory for their weights: 3.0 GiB on one that has 2.0 of 8.0 GiB free"
    )


def test_weights_that_fit_are_let_through():
    run_threads(1, lambda: require_memory(GIB, "x", memory=(GIB, GIB), world=current_groups().world))


def test_a_gpu_without_room_refuses_before_a_weight_is_read(tmp_path, monkeypatch):
    folder = write(tmp_path, "llama")

    def never(*arguments, **options):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("shardwise.parallel.engine.Weights", never)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 2**30))
    with pytest.raises(ValueError, match=r"no memory for their weights \(bfloat16\): 0.0 GiB on one that has 0.0"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), device="cuda:0"))
