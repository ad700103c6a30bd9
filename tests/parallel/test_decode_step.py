"""The fused decode step gives Transformers' tokens, family by family, in the engine as a GPU runs it.

Without a GPU its kernels run in Triton's interpreter, one by one; steps are launched ahead of their tokens even so.
"""

import pytest
import torch
from families import FAMILIES as TINY
from families import NEAR_KIN
from test_quantised import MXFP4, mxfp4_experts, rewrite
from tiny import PROMPTS, VOCAB, expected_tokens, write

from shardwise.comm.rank import current_groups
from shardwise.ops.linear.decode import Tile
from shardwise.ops.triton_support import interpreting
from shardwise.parallel.cuda_graph import DecodeGraphs
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.moe import PackedExperts
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="the interpreter stands for a GPU here; see test_engine_gpu.py"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),
]
COUNT = 3
SMALL = dict(num_hidden_layers=1, head_dim=32)
OPTIONS = dict(decode="fused", attention="torch", cache_tokens=512)
FAMILIES = {name: TINY[name] for name in ("llama", "mistral with a window", "qwen3", "mixtral", "qwen2_moe")} | {
    "llama tied, with biases": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", dict(TINY["qwen3_moe with a dense layer"][1], num_hidden_layers=2)),
    "gpt_oss": (
        "gpt_oss",
        dict(TINY["gpt_oss"][1], num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        dict(
            NEAR_KIN["deepseek_v2"][1],
            num_hidden_layers=2,
            head_dim=16,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
        ),
    ),
}
ALTERNATING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
LONG_FACTORS = dict(
    NEAR_KIN["phi3 with long factors"][1]["rope_parameters"], short_factor=[1.5] * 12, long_factor=[2] * 12
)
FAMILIES |= {name: NEAR_KIN[name] for name in ("glm4", "olmo2", "cohere", "starcoder2", "hunyuan")} | {
    "gemma2": ("gemma2", NEAR_KIN["gemma2"][1] | ALTERNATING | {"seed": 3}),
    "phi3 with small heads": ("phi3", dict(pad_token_id=0, hidden_size=288, head_dim=48)),
    "olmoe": ("olmoe", dict(NEAR_KIN["olmoe"][1], seed=3, hidden_size=192, head_dim=32)),
    "phi3 with long factors": (
        "phi3",
        dict(NEAR_KIN["phi3 with long factors"][1], hidden_size=192, head_dim=32, rope_parameters=LONG_FACTORS),
    ),
}
FAMILIES |= {
    "falcon_h1": (
        "falcon_h1",
        dict(
            NEAR_KIN["falcon_h1"][1],
            num_hidden_layers=1,
            head_dim=32,
            mamba_rms_norm=False,
            mamba_n_groups=1,
        ),
    ),
    "bamba": ("bamba", dict(NEAR_KIN["bamba"][1], num_hidden_layers=2, head_dim=32)),
    "nemotron_h": (
        "nemotron_h",
        dict(
            NEAR_KIN["nemotron_h"][1],
            num_hidden_layers=3,
            head_dim=32,
            layers_block_type=["mamba", "mlp", "attention"],
        ),
    ),
    "qwen3_next": (
        "qwen3_next",
        dict(
            NEAR_KIN["qwen3_next"][1],
            num_hidden_layers=2,
            head_dim=32,
            shared_expert_intermediate_size=36,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
}
"""Heads rotated in part, norms after blocks, of all heads, of layers, capped scores, blocks in parallel; state-space
layers, layers of one block, mixers side by side; gated delta layers, attention with a gated output, a shared expert of
the routed ones' size."""
ON_TWO_RANKS = ("olmo2", "cohere", "bamba", "falcon_h1", "qwen3_next")
CASES = [(name, ParallelLayout()) for name in FAMILIES if name not in ON_TWO_RANKS]
CASES += [(name, ParallelLayout(tp=2)) for name in ON_TWO_RANKS]
CASES += [
    ("llama tied, with biases", ParallelLayout(tp=2)),
    ("qwen3_moe", ParallelLayout(tp=2, moe_ep=2)),
    ("gpt_oss", ParallelLayout(tp=2)),
    ("deepseek_v2", ParallelLayout(tp=2)),
]


def fused(folder, **options) -> Engine:
    """An engine that decodes as on a GPU."""
    return run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), **OPTIONS | options))[0]


def tokens_of(engine, prompts=PROMPTS, params=None) -> list[list[int]]:
    done = engine.generate(prompts, params or SamplingParams(max_new_tokens=COUNT))
    return [list(each.token_ids) for each in done]


@pytest.fixture(autouse=True)
def launches():
    from one_launch import one_launch_at_a_time

    with one_launch_at_a_time():
        yield


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes as long for a program whatever its tile."""
    monkeypatch.setattr("shardwise.ops.linear.decode.tile_for", lambda *args: Tile(64, 1))
    for name in ("UP_TILE", "DOWN_TILE", "SMALL_UP_TILE", "SMALL_DOWN_TILE"):
        monkeypatch.setattr(f"shardwise.ops.moe.decode.{name}", Tile(64, 1))


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_greedy_tokens_equal_transformers(name, layout, tmp_path):
    model_type, fields = FAMILIES[name]
    folder = write(tmp_path, model_type, **{**SMALL, **fields})
    expected = expected_tokens(folder, count=COUNT)
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), **OPTIONS)
        found = tokens_of(engine), tokens_of(engine, PROMPTS[:1])
        assert isinstance(engine.cache, DeviceCache)
        return *found, engine.stats().decode

    for together, alone, path in run_threads(layout.world, rank, layout=layout):
        assert together == expected
        assert alone == expected[:1]
        assert path == "fused step, kernel by kernel: asked for by name"


@pytest.mark.parametrize(
    ("layout", "prompts"),
    [(ParallelLayout(), 2), (ParallelLayout(tp=2, moe_ep=2), 1), (ParallelLayout(tp=2), 1)],
    ids=str,
)
def test_experts_that_stay_mxfp4_give_the_tokens_of_their_values(layout, prompts, tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=64, num_local_experts=5, num_experts_per_tok=2)
    folder = write(tmp_path, "gpt_oss", seed=2, **{**SMALL, **sizes})
    # Without the longest prompt, and on two ranks without any that is longer than a token: they are slow here.
    chosen = slice(2 - prompts, 2)
    expected = [tokens[:COUNT] for tokens in rewrite(folder, mxfp4_experts, MXFP4)][chosen]
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), **OPTIONS)
        assert isinstance(engine.decoder.layers[0].feed_forward.experts, PackedExperts)
        assert engine.stats().weights == "experts MXFP4, the rest float32"
        return tokens_of(engine, PROMPTS[chosen])

    assert all(found == expected for found in run_threads(layout.world, rank, layout=layout))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1, head_dim=32)


def requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    prompts = [[draw(0, VOCAB) for _ in range(draw(1, 80))] for _ in range(count)]
    return prompts, [SamplingParams(max_new_tokens=draw(1, 9)) for _ in range(count)]


def test_steps_ahead_change_no_token_whatever_the_batching(llama, monkeypatch):
    # Pages for two of the longest requests at once, so that running ones give way; answers end at different steps.
    (layers,) = run_threads(1, lambda: Engine(llama, plan(llama), current_groups()))
    prompts, params = requests(9)
    expected = tokens_of(layers, prompts, params)
    monkeypatch.setattr("shardwise.parallel.engine.MAX_BATCH", 4)
    engine = fused(llama, cache_tokens=4 * 64)
    assert tokens_of(engine, prompts, params) == expected
    assert sorted(engine.cache.tables.of[None].free) == list(range(4))


def test_chunks_of_a_prompt_that_are_single_tokens_yield_none(llama, monkeypatch):
    prompts, params = [[5, 17, 200], [7]], SamplingParams(max_new_tokens=2)
    expected = tokens_of(fused(llama), prompts, params)
    monkeypatch.setattr("shardwise.parallel.engine.STEP_TOKENS", 1)
    assert tokens_of(fused(llama), prompts, params) == expected


def test_groups_without_work_launch_no_step(llama, monkeypatch):
    rows, launch = [], DecodeGraphs.launch
    monkeypatch.setattr(
        DecodeGraphs,
        "launch",
        lambda self, batch, *rest: (rows.append(len(batch.spans)), launch(self, batch, *rest))[1],
    )
    layout = ParallelLayout(attn_dp=2)
    made = plan(llama, layout)
    rank = lambda: tokens_of(Engine(llama, made, current_groups(), **OPTIONS), [[5, 17, 200]])  # noqa: E731
    assert run_threads(2, rank, layout=layout) == [tokens_of(fused(llama), [[5, 17, 200]])] * 2
    assert set(rows) == {1}


def test_a_slots_states_are_cleared_behind_a_step_that_nobody_waits_for(tmp_path, monkeypatch):
    model_type, fields = FAMILIES["nemotron_h"]
    folder = write(tmp_path, model_type, **fields)
    monkeypatch.setattr("shardwise.parallel.engine.MAX_BATCH", 2)
    prompts = [[7], [250], [30]]  # whose first step is a decode step too
    expected = expected_tokens(folder, prompts, count=COUNT)
    stops = [SamplingParams(max_new_tokens=COUNT, stop_token_ids=(answer[1],)) for answer in expected]
    ends = [answer[: answer.index(answer[1])] for answer in expected]
    assert tokens_of(fused(folder), prompts, stops) == ends


def test_windows_keep_their_tokens_alone_in_a_ring_of_pages(tmp_path):
    model_type, fields = FAMILIES["gpt_oss"]
    folder = write(tmp_path, model_type, **{**SMALL, **fields, "sliding_window": 40})
    prompts = [list(range(100, 162)), list(range(3, 80))]
    engine = fused(folder)
    assert tokens_of(engine, prompts) == expected_tokens(folder, prompts, COUNT)
    assert {window: table.pages for window, table in engine.cache.tables.of.items()} == {None: 8, 40: 8}
    assert all(len(table.free) == table.pages for table in engine.cache.tables.of.values())


def test_a_stop_id_ends_an_answer_whose_next_step_was_under_way(llama):
    engine = fused(llama)
    params = SamplingParams(max_new_tokens=5)
    free = tokens_of(engine, params=params)
    stop = free[0][2]
    stopped = tokens_of(engine, params=SamplingParams(max_new_tokens=5, stop_token_ids=(stop,)))
    assert stopped == [each[: each.index(stop)] if stop in each else each for each in free]
    assert tokens_of(engine, params=params) == free


def test_leaving_the_stream_with_a_step_under_way_leaves_a_working_engine(llama):
    engine = fused(llama)
    expected = tokens_of(engine)
    for index, _ in enumerate(engine.stream(PROMPTS, SamplingParams(max_new_tokens=COUNT))):
        if index == 4:
            break
    assert tokens_of(engine) == expected
    assert len(engine.cache.tables.of[None].free) == 8


def test_sampled_tokens_equal_those_of_the_layers(llama):
    params = SamplingParams(max_new_tokens=4, temperature=1.5, top_k=20, seed=5)
    (layers,) = run_threads(1, lambda: Engine(llama, plan(llama), current_groups()))
    engine = fused(llama)
    assert tokens_of(engine, params=params) == tokens_of(layers, params=params)


def test_what_a_step_cannot_hold_is_named(monkeypatch, tmp_path):
    folder = write(tmp_path, "llama", num_hidden_layers=1, head_dim=16)
    with pytest.raises(ValueError, match="path fused cannot serve this model: layer 0: head sizes 16 and 16, need one"):
        fused(folder)
    with pytest.raises(ValueError, match="decode graphs needs a CUDA device"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), decode="graphs"))
    with pytest.raises(ValueError, match="decode fused on the CPU, in Triton's interpreter: name the size of its"):
        fused(folder, cache_tokens=None)
    monkeypatch.setattr("shardwise.parallel.engine.interpreting", lambda: False)
    with pytest.raises(ValueError, match="decode fused needs a CUDA device; legal here: auto, layers"):
        fused(folder)
    with pytest.raises(ValueError, match="decode 'fast' is unknown, legal: auto, graphs, fused, layers"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), decode="fast"))


def test_a_request_that_cannot_fit_is_refused_with_the_size_of_the_cache(llama):
    engine = fused(llama, cache_tokens=100)
    with pytest.raises(ValueError, match="may become 80 tokens long .*the cache holds 64;"):
        engine.generate([[1] * 60], SamplingParams(max_new_tokens=20))
