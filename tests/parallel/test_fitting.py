"""A model that has no room for its weights and a request's cache is refused before a weight is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, NEAR_KIN
from shapes import LLAMA as SHAPE
from stored_forms import FORMS
from tiny import write

from shardwise.comm.rank import current_groups
from shardwise.parallel.engine import Engine
from shardwise.parallel.fitting import Holding, require_memory
from shardwise.parallel.host_memory import DoesNotFit
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.weight_form import WeightForm
from shardwise.sharding.checkpoint.resolve import random_checkpoint, resolve
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

GIB = 2**30
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
LARGE = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
PLAIN = WeightForm(False, False, "bfloat16")
ON_GPUS = Holding(dtype=torch.bfloat16, form=PLAIN, device="cuda", tokens=1, sequences=64, step_tokens=2048)
ON_HOST = replace(ON_GPUS, device="cpu")


def refusal(made, holding, memory, monkeypatch, *, asked=False) -> str:
    """What every rank says; `memory` in GiB: (free, total)."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: tuple(int(n * GIB) for n in memory))
    monkeypatch.setattr("shardwise.parallel.fitting.host_memory", lambda: tuple(int(n * GIB) for n in memory))

    def rank():
        with pytest.raises(DoesNotFit) as caught:
            require_memory(
                made, holding, world=current_groups().world, device=torch.device(holding.device), asked=asked
            )
        return str(caught.value)

    texts = set(run_threads(made.layout.world, rank, layout=made.layout))
    assert len(texts) == 1
    return texts.pop()


@pytest.mark.parametrize("name", ["llama", "llama tied, biased, scaled rope", "gpt_oss", "glm4_moe", "gemma2"])
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, moe_ep=2)], ids=str)
def test_weights_and_cache_take_what_was_foretold(tmp_path, name, layout):
    model_type, fields = {**FAMILIES, **NEAR_KIN}[name]
    folder = write(tmp_path, model_type, **fields)
    made = plan(folder, layout) if "moe" in name or "oss" in name else plan(folder, ParallelLayout(tp=layout.tp))

    def rank():
        engine = Engine(folder, made, current_groups(), cache_tokens=64)
        engine.generate([[5, 17]], SamplingParams(max_new_tokens=1))
        return engine.stats()

    holding = replace(ON_HOST, dtype=torch.float32, tokens=64)
    for number, stats in enumerate(run_threads(made.layout.world, rank, layout=made.layout)):
        need = holding.need(made, number)
        assert 0.9 * stats.weight_bytes < need.weights < 1.01 * stats.weight_bytes
        assert need.cache == stats.cache_bytes


@pytest.mark.parametrize("name", ["awq", "gptq 8 bit, symmetric", "int8", "nvfp4", "mxfp4"])
def test_weights_that_are_dequantised_count_as_what_they_become(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | {"quantization_config": FORMS[name].section}))
    made = plan(path, tp=3)

    def rank():
        return Engine(random_checkpoint(path), made, current_groups()).stats()

    for number, stats in enumerate(run_threads(3, rank, layout=made.layout)):
        foretold = replace(ON_HOST, dtype=torch.float32).need(made, number).weights
        assert 0.9 * stats.weight_bytes < foretold < 1.01 * stats.weight_bytes


def test_blocks_that_stay_in_their_form_count_as_stored():
    made = plan(resolve("smollm2"))
    kept = replace(ON_HOST, form=WeightForm(True, False, "as stored")).need(made, 0).weights
    held = run_threads(1, lambda: Engine("smollm2", made, current_groups(), weights="native").stats().weight_bytes)[0]
    assert 0.7 * held < kept < held


def published(architecture: str) -> dict:
    rows = (Path(__file__).parents[1] / "sharding/data/published_configs.jsonl").read_text().splitlines()
    return next(config for config in map(json.loads, rows) if config["architectures"] == [architecture])


@pytest.mark.parametrize(("weights", "fits"), [("auto", True), ("dequantised", False)], ids=["float8", "dequantised"])
def test_deepseek_v3_fits_eight_large_gpus_where_its_weights_stay_float8(weights, fits):
    made = plan(published("DeepseekV3ForCausalLM"), ParallelLayout(tp=8, moe_ep=8))
    form = WeightForm.choose(weights, made.model, torch.bfloat16, torch.device("cuda"), kernels=True)
    assert form.keeps_float8 == fits
    assert replace(ON_GPUS, form=form, tokens=4096).fits(made, 139 * GIB) == fits


@pytest.mark.parametrize(("weights", "fits"), [("native", True), ("dequantised", False)])
@pytest.mark.parametrize("tp", [1, 2])
def test_llama_70b_fits_48_gib_where_its_weights_stay_in_4_bits(weights, fits, tp):
    section = {"quant_method": "awq", "bits": 4, "group_size": 128}
    made = plan(LARGE | {"quantization_config": section}, tp=tp)
    form = WeightForm.choose(weights, made.model, torch.bfloat16, torch.device("cuda"), kernels=True)
    assert form.keeps_int4 == fits
    assert replace(ON_GPUS, form=form, tokens=4096).fits(made, 48 * GIB // tp) == fits


def test_float32_has_no_kernels_for_weights_that_stay_packed():
    made = plan(LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})
    with pytest.raises(ValueError, match="weights native: float8 and 4-bit weights multiply with 16-bit floats, not"):
        WeightForm.choose("native", made.model, torch.float32, torch.device("cuda"), kernels=True)


def test_gpus_without_room_are_counted_and_layouts_that_fit_are_offered(monkeypatch):
    text = refusal(plan(LARGE, tp=2), ON_GPUS, (60, 80), monkeypatch)
    assert text == (
        "no memory for the model on 2 of 2 GPUs: 65.7 GiB of weights (bfloat16), 0.0 GiB of cache for 1 tokens and "
        "2.7 GiB for activations and workspaces, but the GPU of rank 0 has 60.0 GiB of 80.0 GiB free; what fits: tp 4"
    )


def test_a_request_needs_room_beside_weights_that_fit(monkeypatch):
    made = plan(LLAMA)
    assert ON_GPUS.fits(made, 20 * GIB)
    text = refusal(made, replace(ON_GPUS, tokens=100_000), (20, 24), monkeypatch)
    assert "15.0 GiB of weights (bfloat16), 12.2 GiB of cache for 100000 tokens" in text


def test_a_smaller_cache_is_offered_where_one_was_asked_for(monkeypatch):
    made = plan(LLAMA)
    text = refusal(made, replace(ON_GPUS, tokens=100_000), (20, 24), monkeypatch, asked=True)
    assert "what fits: cache_tokens 21568; or tp 2" in text
    tokens = int(text.partition("cache_tokens ")[2].split(";")[0])
    assert replace(ON_GPUS, tokens=tokens).fits(made, 20 * GIB)
    assert not replace(ON_GPUS, tokens=tokens + 64).fits(made, 20 * GIB)


def test_ranks_of_one_host_share_its_memory(monkeypatch):
    made = plan(LLAMA, tp=2)
    wide = replace(ON_HOST, dtype=torch.float32, form=replace(PLAIN, reason="float32"), tokens=256)
    text = refusal(made, wide, (20, 24), monkeypatch)
    assert text.startswith("no memory for the model on 1 of 1 hosts: 29.9 GiB of weights (float32), 0.1 GiB of cache")
    assert text.endswith("has 20.0 GiB of 24.0 GiB free; what fits: dtype bfloat16")


def test_where_nothing_fits_that_is_said(monkeypatch):
    text = refusal(plan(LARGE), ON_GPUS, (1, 80), monkeypatch)
    assert text.endswith("what fits: nothing on eight times as many")


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_an_engine_without_room_refuses_before_a_weight_is_read(tmp_path, monkeypatch, device):
    folder = write(tmp_path, "llama")

    def never(*arguments, **options):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("shardwise.parallel.engine.Weights", never)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 2**30))
    monkeypatch.setattr("shardwise.parallel.fitting.host_memory", lambda: (1000, 2**30))
    with pytest.raises(ValueError, match="no memory for the model on 1 of 1 .* of cache for 128 tokens"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), device=device, request_tokens=4096))
