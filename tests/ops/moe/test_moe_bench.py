"""The MoE benchmark measures what it says: run on tiny layers with a stopwatch that only counts."""

import pytest
import torch

from shardwise.launch.cli import main
from shardwise.ops.moe import bench
from shardwise.ops.moe.bench import INPUTS, LAYERS, Ceilings, Layer, measure_layer
from shardwise.ops.moe.reference import route
from shardwise.ops.triton_support import interpreting

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="tiny layers in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("form,peers", [("mxfp4", set()), ("bf16", {"expert loop"}), ("fp8", {"ours in bf16"})])
def test_rows_carry_floors_and_peers(form, peers):
    outputs, synchronising = [], []

    def stopwatch(calls, eager):
        outputs.extend(call() for each in calls.values() for call in each[:2])
        synchronising.extend(set(calls) & set(eager))
        return dict.fromkeys(calls, 5.0)

    layer = Layer(4, 64, 32, 2, form)
    (row,) = measure_layer("tiny", layer, (3,), stopwatch, Ceilings(90.0, 100.0, 1000.0), "cpu")
    assert all(out.shape == (3, 64) and out.isfinite().all() for out in outputs)
    assert row.us == 5.0 and set(row.peers_us) == peers and len(outputs) == 2 + 2 * len(peers)
    assert set(synchronising) == peers & {"expert loop"}
    assert 2 <= row.active_experts <= 4 and INPUTS > 1
    values = 3 * 64 * 32
    size = {"mxfp4": values * 17 / 32, "bf16": values * 2, "fp8": values}[form]
    assert row.memory_floor_us == pytest.approx(row.active_experts * size / 100)
    assert row.matrix_floor_us == pytest.approx(2 * 3 * 2 * values / (2000 if form == "fp8" else 1000))


def test_runs_measure_the_same_tokens_and_routing(monkeypatch):
    seen = []

    def spy(*args):
        seen.append(args[:2])
        return route(*args)

    monkeypatch.setattr(bench, "route", spy)
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = Layer(4, 64, 32, 2, "bf16")
        list(measure_layer("tiny", layer, (3,), lambda calls, eager: {"ours": 1.0}, Ceilings(1.0, 1.0, 1.0), "cpu"))
    assert len(seen) == 2 * INPUTS and not torch.equal(seen[0][0], seen[1][0])
    for once, again in zip(seen[:INPUTS], seen[INPUTS:], strict=True):
        assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])


def test_known_layers_have_the_published_sizes():
    assert LAYERS["gpt-oss-120b"].expert_bytes == 13219200
    assert LAYERS["mixtral-8x7b"].operations(1) == 6 * 2 * 4096 * 14336


@pytest.mark.parametrize(
    "words,text",
    [
        (["--layer", "llama"], "unknown layer 'llama'; legal: gpt-oss-120b"),
        (["--layer", "gpt-oss-120b", "--experts", "3"], "at least the layer's top-k"),
    ],
)
def test_usage_errors_name_the_legal_values(capsys, words, text):
    assert main(["bench", "moe", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answer of a machine without a GPU")
def test_without_a_device_it_says_so(capsys):
    assert main(["bench", "moe"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
