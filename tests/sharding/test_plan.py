"""What a plan answers: shards by name, totals, cache, collectives, experts, extras."""

from dataclasses import FrozenInstanceError

import pytest
from published_models import CONFIGS, model

from shardwise.sharding.axes import Axis, LogicalAxis
from shardwise.sharding.cuts import Cut
from shardwise.sharding.cutting import IllegalLayout
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.parts import check_parts
from shardwise.sharding.plan import plan
from shardwise.sharding.shards import Cuts

SMOL = "HuggingFaceTB/SmolLM-135M"
QWEN_MOE = "Qwen/Qwen3-30B-A3B"
LAYER = "model.layers.7"


def test_nine_heads_on_two_ranks():
    made = plan(model(SMOL), tp=2)
    q = [made.shard(r, f"{LAYER}.self_attn.q_proj.weight") for r in range(2)]
    assert [s.ranges for s in q] == [(((0, 384),), ((0, 576),)), (((384, 576),), ((0, 576),))]
    assert [s.local_shape for s in q] == [(384, 576), (192, 576)]
    assert q[0].nbytes == 384 * 576 * 2 and q[0].dtype == "BF16" and q[0].role == "q.weight"
    o = made.shard(1, f"{LAYER}.self_attn.o_proj.weight")
    assert o.ranges == (((0, 576),), ((384, 576),))
    assert [r.kv_bytes_per_token for r in made.ranks] == [30 * 2 * 2 * 64 * 2, 30 * 1 * 2 * 64 * 2]
    assert any("9 q_heads on 2 ranks are uneven: 6 to 3" in w for w in made.warnings)


def test_a_norm_is_whole_on_every_rank():
    made = plan(model(SMOL), tp=3)
    shards = [made.shard(r, "model.norm.weight") for r in range(3)]
    assert all(s.whole and s.ranges == (((0, 576),),) for s in shards)


def test_names_and_shards_agree_with_patterns():
    made = plan(model(QWEN_MOE), tp=4, ep=2)
    names = list(made.names())
    assert len(names) == len(set(names)) == sum(p.count for p in made.patterns)
    for rank in (0, 3):
        held = list(made.shards(rank))
        assert sum(s.nbytes for s in held) == made.ranks[rank].weight_bytes
        assert len(held) == made.ranks[rank].tensors


def test_an_expert_of_another_rank_is_not_held():
    made = plan(model(QWEN_MOE), tp=4, ep=4)
    name = f"{LAYER}.mlp.experts.40.up_proj.weight"
    shards = [made.shard(r, name) for r in range(4)]
    assert [s.held for s in shards] == [False, True, False, False]
    assert shards[0].nbytes == 0 and shards[0].local_shape == (0, 0)
    assert shards[1].whole


def test_experts_are_dealt_over_ep_and_cut_over_moe_tp():
    made = plan(model(QWEN_MOE), tp=4, ep=2)
    axis = LogicalAxis(Axis.EXPERTS, 128)
    assert [made.experts(r, axis)[0] for r in range(4)] == [0, 64, 0, 64]
    name = f"{LAYER}.mlp.experts.0.down_proj.weight"
    assert [made.shard(r, name).ranges[1] for r in (0, 2)] == [((0, 384),), ((384, 768),)]


def test_remainder_experts_go_to_the_first_ranks():
    made = plan(model("Qwen/Qwen1.5-MoE-A2.7B"), tp=8, ep=8)
    axis = LogicalAxis(Axis.EXPERTS, 60)
    assert [len(made.experts(r, axis)) for r in range(8)] == [8, 8, 8, 8, 7, 7, 7, 7]


def test_redundant_experts_cost_their_bytes():
    lean = plan(model(QWEN_MOE), tp=8, ep=8)
    rich = plan(model(QWEN_MOE), tp=8, ep=8, redundant_experts=8)
    expert = 3 * 768 * 2048 * 2 * 48
    assert [a.weight_bytes - b.weight_bytes for a, b in zip(rich.ranks, lean.ranks, strict=True)] == [expert] * 8


def test_attention_data_parallel_ranks_repeat_the_attention_and_share_the_experts():
    made = plan(model(QWEN_MOE), tp=2, attn_dp=2, ep=4)
    name = f"{LAYER}.self_attn.q_proj.weight"
    assert made.shard(0, name) == made.shard(2, name) != made.shard(1, name)
    axis = LogicalAxis(Axis.EXPERTS, 128)
    assert sorted(e for r in range(4) for e in made.experts(r, axis)) == list(range(128))
    ops = {(c.where, c.op, c.axis) for c in made.collectives}
    assert {("moe_dispatch", "all_to_all", "moe_ep"), ("moe_combine", "all_to_all", "moe_ep")} <= ops


def test_an_unknown_tensor_is_a_key_error():
    made = plan(model(QWEN_MOE))
    for name in ("model.layers.48.mlp.gate.weight", "model.layers.0.mlp.experts.128.up_proj.weight", "nothing"):
        with pytest.raises(KeyError, match="has no tensor"):
            made.shard(0, name)


def test_biases_behind_a_row_parallel_matmul_are_whole_and_marked():
    made = plan(model("openai/gpt-oss-20b"), tp=2)
    bias = made.shard(1, "model.layers.0.self_attn.o_proj.bias")
    assert bias.whole
    specs = {t.name: t for t in model("openai/gpt-oss-20b").layers[0].tensors}
    marked = {name for name, t in specs.items() if t.row_parallel_bias}
    assert marked == {"model.layers.{layer}.self_attn.o_proj.bias", "model.layers.{layer}.mlp.experts.down_proj_bias"}


def test_collectives_of_a_dense_model():
    made = plan(model("meta-llama/Meta-Llama-3.1-8B"), tp=4)
    found = {(c.where, c.op): (c.bytes_per_token, c.count) for c in made.collectives}
    assert found == {
        ("embedding", "all_reduce"): (8192, 1),
        ("mixer", "all_reduce"): (8192, 32),
        ("mlp", "all_reduce"): (8192, 32),
        ("head", "all_gather"): (128256 * 2, 1),
    }
    assert plan(model("meta-llama/Meta-Llama-3.1-8B")).collectives == ()


def test_a_norm_over_all_heads_needs_a_mean_across_ranks():
    found = plan(model("MiniMaxAI/MiniMax-M2.5"), tp=4).collectives
    assert [c.count for c in found if c.where == "qk_norm"] == [62]


def test_cache_respects_windows():
    made = plan(model("openai/gpt-oss-20b"))
    per_layer = 8 * 64 * 2 * 2
    assert made.cache_bytes(0, 100) == 24 * per_layer * 100
    assert made.cache_bytes(0, 1000, batch=3) == 3 * per_layer * (12 * 1000 + 12 * 128)


def test_latent_cache_is_the_same_at_any_tp():
    spec = model("deepseek-ai/DeepSeek-V3")
    assert {plan(spec, tp=tp).ranks[0].kv_bytes_per_token for tp in (1, 4, 16)} == {61 * 576 * 2}


def test_state_of_recurrent_layers_is_cut_with_their_heads():
    spec = model("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    whole, cut = plan(spec).ranks[0], plan(spec, tp=4).ranks[0]
    assert whole.state_bytes_per_sequence == 4 * cut.state_bytes_per_sequence > 0


def test_extras_are_listed_and_loaded_only_when_asked_for():
    spec = model("deepseek-ai/DeepSeek-V3")
    lean, rich = plan(spec), plan(spec, extras=["mtp"])
    assert rich.parameters == lean.parameters
    assert rich.ranks[0].weight_bytes > lean.ranks[0].weight_bytes + 11e9
    assert "model.layers.61.eh_proj.weight" in set(rich.names()) - set(lean.names())


def test_uneven_vocabulary_needs_no_padding_but_can_have_it():
    spec = model("openai-community/gpt2")
    rows = [plan(spec, tp=4).shard(r, "transformer.wte.weight").local_shape[0] for r in range(4)]
    assert rows == [12565, 12564, 12564, 12564]
    padded = plan(spec, tp=4, pad=["vocab"])
    assert [padded.shard(r, "transformer.wte.weight").local_shape[0] for r in range(4)] == [12565] * 4


def test_fused_projections_are_cut_part_by_part():
    made = plan(model("microsoft/phi-4"), tp=4)
    q, kv, d = 5120, 1280, 128
    shard = made.shard(3, "model.layers.0.self_attn.qkv_proj.weight")
    assert shard.ranges[0] == ((q - 8 * d, q), (q + kv - 2 * d, q + kv), (q + 2 * kv - 2 * d, q + 2 * kv))
    gate_up = made.shard(1, "model.layers.0.mlp.gate_up_proj.weight").ranges[0]
    assert gate_up == ((4480, 8960), (17920 + 4480, 17920 + 8960))


def test_interleaved_projections_are_cut_group_by_group():
    made = plan(model("internlm/internlm2_5-7b"), tp=4)
    group = (4 + 2) * 128
    assert made.shard(1, "model.layers.0.attention.wqkv.weight").ranges[0] == ((2 * group, 4 * group),)
    shared = plan(model("internlm/internlm2_5-7b"), tp=16).shard(1, "model.layers.0.attention.wqkv.weight")
    assert shared.ranges[0] == ((2 * 128, group),)


def test_one_ssm_group_stands_on_every_rank():
    made = plan(model("ibm-granite/granite-4.0-h-small"), tp=4)
    ranges = made.shard(2, "model.layers.0.mamba.in_proj.weight").ranges[0]
    inner, state, heads = 8192, 128, 128
    assert ranges == (
        (4096, 6144),
        (inner + 4096, inner + 6144),
        (2 * inner, 2 * inner + 2 * state),
        (2 * inner + 2 * state + 64, 2 * inner + 2 * state + 96),
    )
    assert sum(b - a for a, b in ranges) == 2 * 2048 + 2 * state + heads // 4


def test_a_refusal_names_the_tensor_the_numbers_and_the_ways_out():
    with pytest.raises(IllegalLayout) as error:
        plan(model(SMOL), tp=10)
    text = str(error.value)
    assert "model.layers.{layer}.self_attn.q_proj.weight: 9 q_heads in 3 groups on 10 ranks" in text
    assert "at most 9" in text and "--attn-dp" in text


@pytest.mark.parametrize(
    "world, ep, offers",
    [
        (1024, 1, "smaller moe_tp (at most 768), or --pad expert_mlp, or expert parallel instead (--ep 128)"),
        (2000, 2, "or --pad expert_mlp, or expert parallel instead (--ep 125)"),
        (887 * 2, 2, "smaller moe_tp (at most 768), or --pad expert_mlp"),
        (512, 512, "128 experts units, too few for 512 ranks; smaller ep (at most 128)"),
    ],
)
def test_experts_are_offered_to_no_more_ranks_than_there_are_experts(world, ep, offers):
    with pytest.raises(IllegalLayout) as error:
        plan(model(QWEN_MOE), attn_dp=world, ep=ep)
    assert str(error.value).endswith(offers)


def test_layout_objects_and_sizes_mean_the_same():
    spec = model(QWEN_MOE)
    assert plan(spec, ParallelLayout(4, moe_ep=2)).ranks == plan(spec, tp=4, ep=2).ranks
    with pytest.raises(TypeError, match=r"layout is 'tp2': give a ParallelLayout, .* plan\(model, tp=2\)"):
        plan(spec, "tp2")


@pytest.mark.parametrize(
    "option, error, text",
    [
        ({"pad": "vocab"}, TypeError, "pad is 'vocab': give a list of names"),
        ({"extras": "mtp"}, TypeError, "extras is 'mtp': give a list of names"),
        ({"extras": 5}, TypeError, "extras is 5: give a list of names"),
        ({"kv_itemsize": 0}, ValueError, "kv_itemsize is 0, expected 1, 2, 4"),
    ],
    ids=str,
)
def test_options_of_another_form_are_refused(option, error, text):
    with pytest.raises(error, match=text):
        plan(model(SMOL), **option)


def test_plans_are_values():
    made = plan(CONFIGS[SMOL], tp=2)
    assert made.model == model(SMOL)
    with pytest.raises(FrozenInstanceError):
        made.layout = ParallelLayout(1)


def test_the_self_check_sees_a_hole_and_an_undeclared_overlap():
    spec = model(SMOL)
    made = plan(spec, tp=2)
    mlp = LogicalAxis(Axis.MLP, 1536)

    class Broken(Cut):
        def share(self, index):
            return super().share(0)

    cuts = Cuts(made.layout, made.cuts.by_axis | {mlp: Broken(mlp, 2)}, {})
    with pytest.raises(AssertionError, match="on no rank"):
        check_parts(spec.layers[0].tensors, cuts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pad": ["experts"]}, "pad: the model has no 'experts'; it has vocab, q_heads, kv_heads, mlp"),
        ({"extras": ["mtp"]}, "extras: the model has no 'mtp'; it has none"),
        ({"redundant_experts": 2}, "2 redundant experts: the model has no routed experts"),
        ({"dtype": "int1"}, "dtype 'int1' is not known"),
    ],
)
def test_options_that_the_model_has_no_use_for_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        plan(model(SMOL), **options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "section", "fields"),
    [
        ("Qwen/Qwen3.5-27B", "text_config", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("MiniMaxAI/MiniMax-M2.5", None, {"moe_intermediate_size": 20}),
    ],
)
def test_fields_of_kindred_architectures_change_nothing(name, section, fields):
    config = CONFIGS[name]
    changed = config | ({section: config[section] | fields} if section else fields)
    assert plan(changed).ranks == plan(config).ranks


def test_expert_parallel_ranks_of_a_dense_model_are_a_warning():
    assert any("no routed experts" in w for w in plan(model(SMOL), tp=3, ep=3).warnings)


def test_what_if_weights_had_another_type():
    halves, floats = plan(model(QWEN_MOE)), plan(model(QWEN_MOE), dtype="float32")
    assert floats.ranks[0].weight_bytes == 2 * halves.ranks[0].weight_bytes
    blocks = model("Qwen/Qwen3-30B-A3B-FP8")
    assert plan(blocks, dtype="float32").shard(0, "model.layers.0.mlp.experts.0.up_proj.weight").dtype == "F8_E4M3"


def test_imbalance_is_the_fullest_rank_over_the_average():
    assert plan(model(SMOL), tp=3).imbalance == 0
    a, b = (r.weight_bytes for r in plan(model(SMOL), tp=2).ranks)
    assert plan(model(SMOL), tp=2).imbalance == pytest.approx(a / ((a + b) / 2) - 1) and a > b


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("openai/gpt-oss-120b", {"tp": 6, "attn_dp": 4, "ep": 8}),  # blocks of 32 that three ranks cannot share evenly
        ("openai/gpt-oss-20b", {"tp": 5, "attn_dp": 3, "ep": 5, "redundant_experts": 3}),
        ("ibm-granite/granite-4.0-h-small", {"tp": 7, "attn_dp": 5, "ep": 5}),
        ("internlm/internlm2_5-7b", {"tp": 12}),
    ],
    ids=str,
)
def test_ranks_that_hold_alike_are_summed_once_and_every_rank_gets_its_own_sum(name, sizes):
    made = plan(model(name), **sizes)
    summed = [
        sum(made.pattern_shard(p, rank).nbytes * made.pattern_count(p, rank) for p in made.loaded)
        for rank in range(made.layout.world)
    ]
    assert [r.weight_bytes for r in made.ranks] == summed and len(set(summed)) > 1
    assert made.fullest_rank == summed.index(max(summed))
