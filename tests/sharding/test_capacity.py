from dataclasses import replace
from types import SimpleNamespace

import pytest
from published_models import CONFIGS

from shardwise.sharding import capacity, topology
from shardwise.sharding.capacity import most_context, most_sequences, remedies
from shardwise.sharding.cost import Workload, memory_of
from shardwise.sharding.plan import plan

LLAMA, KIMI = "meta-llama/Meta-Llama-3.1-70B", "moonshotai/Kimi-K2-Instruct"
H200 = topology.load("h200")


def fits(planned, workload):
    return memory_of(planned, H200, workload, planned.fullest_rank).fits


@pytest.mark.parametrize("workload", [Workload(), Workload(batch=7, context=32768, prompt=4096)], ids=str)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 4}, {"tp": 2, "attn_dp": 2}], ids=str)
def test_the_most_that_fits_fits_and_one_more_does_not(layout, workload):
    planned = plan(CONFIGS[LLAMA], **layout)
    batch = most_sequences(planned, H200, workload)
    assert fits(planned, replace(workload, batch=batch)) and not fits(planned, replace(workload, batch=batch + 1))
    context = most_context(planned, H200, workload)
    assert fits(planned, replace(workload, context=context)) and not fits(
        planned, replace(workload, context=context + 1)
    )


def test_weights_that_do_not_fit_leave_room_for_nothing():
    planned = plan(CONFIGS[LLAMA])
    assert most_sequences(planned, topology.load("h100"), Workload()) == 0


def test_remedies_fit_and_begin_with_those_that_keep_the_layout():
    planned = plan(CONFIGS[LLAMA], tp=2)
    found = list(remedies(planned, H200, Workload(batch=64, context=32768)))
    assert [text.split()[0] for text in found] == ["--batch", "--context", "tp"]
    assert found[2].startswith("tp 8 (--search --gpus 8")
    more = list(remedies(plan(CONFIGS[KIMI], tp=8, ep=8), topology.load("h100"), Workload()))
    assert len(more) == 1 and "--search --gpus" in more[0]


@pytest.mark.parametrize(
    "layout, sizes",
    [({"tp": 8, "ep": 8}, [8, 16, 32, 64]), ({"tp": 8, "attn_dp": 128, "ep": 256}, [1024, 2048, 4096]),
     ({"tp": 8, "attn_dp": 640, "ep": 320}, [])],
    ids=str,
)  # fmt: skip
def test_what_would_fit_is_looked_for_on_as_many_devices_as_a_search_tries(layout, sizes, monkeypatch):
    searched = []
    monkeypatch.setattr(
        capacity, "search", lambda *_, devices, **__: searched.append(devices) or SimpleNamespace(fits=False)
    )
    list(remedies(plan(CONFIGS[KIMI], **layout), H200, Workload(batch=10**7)))
    assert searched == sizes
