"""4-bit integers that stay so: the tokens of the weights that they stand for, in the engine as a GPU runs it."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import NEAR_KIN
from shapes import QWEN_MOE
from stored_forms import AwqForm, GptqForm, PackedIntForm, gptq, packed
from test_decode_step import OPTIONS, few_programs, fused, launches, tokens_of  # noqa: F401
from test_fitting import ON_GPUS
from test_quantised import is_linear, rewrite
from tiny import PROMPTS, write

from shardwise.comm.rank import current_groups
from shardwise.ops.linear.int4 import Tile
from shardwise.ops.moe import int4 as int4_moe
from shardwise.ops.triton_support import interpreting
from shardwise.parallel import load_int4
from shardwise.parallel.engine import Engine
from shardwise.parallel.fitting import widened_bytes
from shardwise.parallel.int4_linear import Int4Experts, Int4Linear
from shardwise.parallel.layers import Linear
from shardwise.parallel.moe import Experts
from shardwise.parallel.weight_form import WeightForm
from shardwise.parallel.weights import Weights
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import random_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="the interpreter stands for a GPU here; see test_int4_gpu.py"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),
]
FIELDS = dict(
    num_hidden_layers=1,
    hidden_size=128,
    intermediate_size=256,
    head_dim=32,
    num_attention_heads=4,
    num_key_value_heads=4,
)
LATENT = (
    FIELDS
    | NEAR_KIN["deepseek_v2"][1]
    | dict(
        num_hidden_layers=2,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    )
)
EXPERTS = FIELDS | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
FORMS = {
    "awq": AwqForm(AWQ | {"group_size": 64}, group=64),
    "gptq": GptqForm(gptq(group=32), group=32),
    "gptq, whole rows": GptqForm(gptq(group=-1), group=-1),
    "compressed-tensors": PackedIntForm(packed(group_size=64), group=64),
    "compressed-tensors, zero points": PackedIntForm(packed(group_size=32, symmetric=False), group=32, symmetric=False),
}
EXPERT_CASES = {
    "awq": ("awq", ParallelLayout()),
    "gptq, tp 2": ("gptq", ParallelLayout(tp=2)),
    "compressed-tensors, tp 2, ep 2": ("compressed-tensors, zero points", ParallelLayout(tp=2, moe_ep=2)),
}
CASES = [(name, ParallelLayout()) for name in FORMS] + [(name, ParallelLayout(tp=2)) for name in ("awq", "gptq")]


def in_form(form):
    """Linear layers are stored in a form."""

    def change(name, tensor):
        if not is_linear(name, tensor):
            return {name: tensor}, tensor
        stored, plain = form.store(np.random.default_rng(zlib.crc32(name.encode())), *tensor.shape)
        return {name.removesuffix(".weight") + suffix: part for suffix, part in stored.items()}, plain

    return change


def written(folder, form, model_type="llama", **fields):
    """A folder in this form, and the tokens of its values."""
    folder = write(folder, model_type, seed=2, **FIELDS | fields)
    return folder, [tokens[:3] for tokens in rewrite(folder, in_form(form), form.section)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes as long for a program whatever its tile."""
    monkeypatch.setattr("shardwise.ops.linear.int4.tile_for", lambda *args: Tile(8, 2, 2))
    for name in ("INT4_UP_TILE", "INT4_DOWN_TILE"):
        monkeypatch.setattr(f"shardwise.ops.moe.decode.{name}", int4_moe.Tile(8, 4, 1))
    monkeypatch.setattr("shardwise.ops.moe.int4.TILES", {8: int4_moe.Tile(8, 4, 1)})


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_tokens_equal_those_of_the_values(tmp_path, name, layout):
    folder, expected = written(tmp_path, FORMS[name])
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), **OPTIONS)
        layer = engine.decoder.layers[-1]
        linears = (layer.mixer.qkv, layer.mixer.out, layer.feed_forward.gate_up, layer.feed_forward.down)
        assert all(isinstance(linear, Int4Linear) for linear in linears)
        stats = engine.stats()
        assert stats.weights.startswith("4-bit integers with scales of ")
        assert stats.decode == "fused step, kernel by kernel: asked for by name"
        assert_planned(engine, made)
        return tokens_of(engine, PROMPTS[:2])

    assert all(found == expected[:2] for found in run_threads(layout.world, rank, layout=layout))


def assert_planned(engine, made, besides=100):
    """Weights take what was planned: beside it, rotation and norms have so many bytes at the most."""
    form = WeightForm.choose("auto", made.model, torch.float32, torch.device("cpu"), kernels=True)
    need = replace(ON_GPUS, dtype=torch.float32, form=form).need(made, engine.groups.world.rank)
    assert 0 <= engine.stats().weight_bytes - need.weights < besides


@pytest.mark.parametrize(("name", "layout"), EXPERT_CASES.values(), ids=EXPERT_CASES)
def test_tokens_of_experts_equal_those_of_the_values(tmp_path, name, layout):
    folder, expected = written(tmp_path, FORMS[name], "qwen3_moe", **EXPERTS)
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), **OPTIONS)
        assert isinstance(engine.decoder.layers[0].feed_forward.experts, Int4Experts)
        stats = engine.stats()
        assert "dequantised" not in stats.weights
        assert stats.decode == "fused step, kernel by kernel: asked for by name"
        assert_planned(engine, made, besides=3000)
        return tokens_of(engine, PROMPTS[:1])

    assert all(found == expected[:1] for found in run_threads(layout.world, rank, layout=layout))


@pytest.mark.parametrize("name", FORMS)
def test_experts_are_drawn_and_packed_together_as_one_by_one(tmp_path, monkeypatch, name):
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "quantization_config": FORMS[name].section}
    path.write_text(json.dumps(QWEN_MOE | sizes))
    made = plan(path, tp=2, ep=2, attn_dp=2)
    block = made.model.layers[0].feed_forward[0]

    def stacks(values):
        monkeypatch.setitem(load_int4.STACK_VALUES, "cpu", values)
        weights = Weights(
            random_checkpoint(path), made, 1, dtype=torch.float32, device=torch.device("cpu"), keeps_int4=True
        )
        return load_int4.int4_stacks(weights, block, 0, made.experts(1, block.expert_axis))

    together, apart = stacks(1 << 26), stacks(1)
    assert together[0].matrices > 1
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.words, other.words) and torch.equal(one.weight.scales, other.weight.scales)


def test_experts_whose_rows_are_not_whole_groups_are_dequantised_and_say_so(tmp_path):
    fields = EXPERTS | {"moe_intermediate_size": 48}
    folder, expected = written(tmp_path, FORMS["gptq, whole rows"], "qwen3_moe", **fields)
    engine = fused(folder)
    assert isinstance(engine.decoder.layers[0].feed_forward.experts, Experts)
    assert isinstance(engine.decoder.layers[0].mixer.qkv, Int4Linear)
    assert "MiB of them dequantised from" in engine.stats().weights
    assert_planned(engine, plan(folder), besides=3000)
    assert tokens_of(engine, PROMPTS[:1]) == expected[:1]


def test_experts_of_long_prompts_go_by_plain_copies_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.parallel.int4_linear.PAIRS_OF_EXPERT", 0)
    folder, expected = written(tmp_path, FORMS["gptq"], "qwen3_moe", **EXPERTS)
    engine, made = fused(folder), plan(folder)
    form = WeightForm.choose("auto", made.model, torch.float32, torch.device("cpu"), kernels=True)
    buffer = engine.decoder.layers[0].feed_forward.experts._widened.__self__
    assert buffer._memory.nbytes == widened_bytes(made, 0, 4, form) == 4 * (4 * 3 * 128 * 128)  # all experts of a layer
    assert tokens_of(engine, PROMPTS[:1]) == expected[:1]


def test_latent_attention_stays_in_4_bits_and_so_do_experts_beside_it(tmp_path):
    folder = write(tmp_path, "deepseek_v2", seed=2, **LATENT)
    form = FORMS["gptq"]
    expected = [tokens[:3] for tokens in rewrite(folder, in_form(form), form.section)]
    made = plan(folder, tp=2)

    def rank():
        engine = Engine(folder, made, current_groups(), **OPTIONS)
        mixer = engine.decoder.layers[-1].mixer
        assert all(isinstance(linear, Int4Linear) for linear in (mixer.down, mixer.q_up, mixer.out))
        assert isinstance(engine.decoder.layers[-1].feed_forward.routed.experts, Int4Experts)
        assert "MiB of them dequantised from" in engine.stats().weights
        return tokens_of(engine, PROMPTS[:1])

    assert all(found == expected[:1] for found in run_threads(2, rank, layout=made.layout))


def test_long_prompts_go_by_plain_copies_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.parallel.int4_linear.most_tokens", lambda weight: 4)
    folder, expected = written(tmp_path, FORMS["awq"])
    assert tokens_of(fused(folder), PROMPTS[:1]) == expected[:1]


def test_an_order_of_its_own_is_dequantised_and_says_so(tmp_path):
    ordered = GptqForm(gptq(group=32, desc_act=True), group=32, act_order=True)
    folder, expected = written(tmp_path, ordered)
    engine = fused(folder)
    assert isinstance(engine.decoder.layers[0].mixer.qkv, Linear)
    assert "dequantised: GPUs keep float8, 4-bit integers in the order of their groups" in engine.stats().weights
    assert tokens_of(engine, PROMPTS[:1]) == expected[:1]
    with pytest.raises(ValueError, match="weights native: GPUs keep .* order of their groups, .* with 16-bit scales"):
        fused(folder, weights="native")


def test_dequantised_weights_are_asked_for_by_name(tmp_path):
    folder, expected = written(tmp_path, FORMS["awq"])
    engine = fused(folder, weights="dequantised")
    assert isinstance(engine.decoder.layers[0].mixer.qkv, Linear)
    assert engine.stats().weights.startswith("float32, asked for by name")


@pytest.mark.parametrize(("model_type", "fields"), [("llama", {}), ("qwen3_moe", EXPERTS)], ids=["linear", "experts"])
def test_an_order_that_the_config_denies_is_refused(tmp_path, model_type, fields):
    folder, _ = written(tmp_path, GptqForm(gptq(group=32), group=32, act_order=True), model_type, **fields)
    with pytest.raises(CheckpointError, match="rows are not in the order of their groups, .* set desc_act to true"):
        fused(folder)
