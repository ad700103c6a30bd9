import pytest
from published_models import model

from shardwise.sharding import topology
from shardwise.sharding.cost import Workload, collective_seconds, estimate, touched_share
from shardwise.sharding.plan import plan
from shardwise.sharding.search import Objective, layouts, search
from shardwise.sharding.shards import Cuts
from shardwise.sharding.source import load_model

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
H200 = topology.load("h200")


def test_decode_of_one_sequence_is_bound_by_streaming_the_weights_once():
    cost = estimate(plan(LLAMA_8B, tp=1), H200, Workload(batch=1, context=1024))
    rate = H200.device.memory_bandwidth_bytes_per_second
    streamed = (8_030_261_248 - 128256 * 4096) * 2 / rate
    assert cost.decode.weights == pytest.approx(streamed)
    assert cost.decode.cache == pytest.approx(1024 * 32 * 8 * 256 * 2 / rate)
    assert cost.decode.bound == "weights"
    assert 220 < cost.decode_tokens_per_second < 1 / streamed == pytest.approx(280, abs=1)  # 234 were measured


def test_a_long_prefill_is_bound_by_arithmetic():
    cost = estimate(plan(LLAMA_8B, tp=1), H200, Workload(batch=8, prompt=4096))
    operations = 2 * (8_030_261_248 - 128256 * 4096) * 8 * 4096
    assert cost.prefill.bound == "compute" and cost.prefill.compute > operations / H200.device.flops_16bit


def test_memory_counts_weights_cache_and_says_when_it_does_not_fit():
    small = estimate(plan(LLAMA_8B, tp=1), H200, Workload(batch=1, context=8192)).memory
    assert small.weights == 16_060_522_496 and small.cache == 8192 * 32 * 8 * 256 * 2 and small.fits
    assert not estimate(plan(LLAMA_8B, tp=1), H200, Workload(batch=4096, context=8192)).memory.fits


def test_an_all_reduce_costs_its_latency_and_twice_the_bytes_that_cross():
    planned = plan(LLAMA_8B, tp=4)
    reduce = next(c for c in planned.collectives if c.where == "mixer")
    wire = 4096 * 2 * 100 * 2 * 3 / 4 / H200.intra.bandwidth_bytes_per_second
    assert collective_seconds(reduce, planned, H200, 100) == pytest.approx(H200.intra.latency_seconds + wire)


def test_a_dense_model_touches_no_experts():
    assert touched_share(plan(LLAMA_8B), 10) == 0.0


def test_layouts_of_a_mixture_cover_the_grid_and_those_of_a_dense_model_only_tp():
    assert [(x.tp, x.attn_dp) for x in layouts(8, experts=False)] == [(1, 1), (2, 1), (4, 1), (8, 1)]
    grid = [(x.tp, x.attn_dp, x.moe_tp, x.moe_ep) for x in layouts(4, experts=True)]
    assert len(grid) == len(set(grid)) == 1 + 2 * 2 + 3 * 3
    assert all(tp * dp == moe_tp * ep for tp, dp, moe_tp, ep in grid)


def test_search_puts_the_fastest_fitting_layout_first_and_keeps_reasons_of_the_refused():
    spec = load_model(
        {**LLAMA_8B, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 768, "head_dim": 128}
    )
    result = search(spec, H200, Workload(), devices=8, objective=Objective.LATENCY)
    times = [c.estimate.decode.total for c in result.ranked]
    assert times == sorted(times) and len(result.ranked) + len(result.refused) == 4
    assert [r.layout.tp for r in result.refused] == [8] and "q_heads" in result.refused[0].reasons[0]


def test_search_by_memory_and_throughput_order_by_their_figure():
    spec = load_model(LLAMA_8B)
    memory = search(spec, H200, Workload(), devices=8, objective=Objective.MEMORY).ranked
    assert memory[0].layout.tp == 8
    throughput = search(spec, H200, Workload(batch=8), devices=8, objective=Objective.THROUGHPUT).ranked
    figures = [c.tokens_per_second for c in throughput]
    assert figures == sorted(figures, reverse=True)


def test_a_search_works_out_what_its_layouts_share_once(monkeypatch):
    cut, shard = [], Cuts.shard
    monkeypatch.setattr(Cuts, "shard", lambda *args: cut.append(args) or shard(*args))
    result = search(model("openai/gpt-oss-120b"), H200, Workload(), devices=256, objective=Objective.LATENCY)
    assert len(result.ranked) > 200 and len(cut) < sum(c.layout.world for c in result.ranked) / 20
    for candidate in result.ranked[::50]:
        alone = plan(model("openai/gpt-oss-120b"), candidate.layout)
        assert candidate.plan == alone and candidate.estimate == estimate(alone, H200, Workload())
        assert candidate.plan.ranks == alone.ranks


@pytest.mark.parametrize("field", ["batch", "context", "prompt", "chunk"])
def test_a_workload_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        Workload(**{field: 0})
