"""The engine on GPUs: tokens of tiny checkpoints equal the CPU's, with and without graphs, on one GPU and on two."""

import pytest
import torch
from families import NEAR_KIN
from test_decode_step import ALTERNATING, COUNT, FAMILIES
from test_quantised import MXFP4, mxfp4_experts, rewrite
from tiny import PROMPTS, VOCAB, expected_tokens, write

from shardwise.comm.rank import current_groups
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import SlotCache
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_processes, run_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
SMALL = dict(num_hidden_layers=2, head_dim=32, max_position_embeddings=512)
PATHS = ("graphs", "fused", "layers")
ON_GPUS = FAMILIES | {  # whose routing is no part of the kernels that the interpreter runs
    "deepseek_v3": (
        "deepseek_v3",
        dict(FAMILIES["deepseek_v2"][1], q_lora_rank=20, n_group=2, topk_group=1, topk_method="noaux_tc"),
    ),
    "glm4_moe": ("glm4_moe", dict(NEAR_KIN["glm4_moe"][1], num_hidden_layers=2)),
    # Whole heads rotated: older releases of Transformers do that whatever the config says.
    "minimax_m2": ("minimax_m2", dict(NEAR_KIN["minimax_m2"][1], rotary_dim=32)),
    "granite": NEAR_KIN["granite"],
    "gemma3": ("gemma3_text", NEAR_KIN["gemma3"][1] | ALTERNATING),
}
del ON_GPUS["qwen3_next"]  # test_states_gpu.py has it: Transformers cannot run it on the CPU where fla is installed
MXFP4_SIZES = dict(hidden_size=64, intermediate_size=64, num_local_experts=5, num_experts_per_tok=2)


def engine_on(folder, device="cuda", **options) -> Engine:
    return run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), device=device, **options))[0]


def tokens_of(engine, prompts=PROMPTS, params=None) -> list[list[int]]:
    done = engine.generate(prompts, params or SamplingParams(max_new_tokens=COUNT))
    return [list(each.token_ids) for each in done]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder and Transformers' tokens of a family, made once."""
    made = {}

    def of(name):
        if name not in made:
            model_type, fields = ON_GPUS[name]
            folder = write(tmp_path_factory.mktemp("model"), model_type, **{**SMALL, **fields})
            made[name] = folder, expected_tokens(folder, count=COUNT)
        return made[name]

    return of


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ON_GPUS)
def test_float32_tokens_equal_transformers(checkpoint, name, path):
    folder, expected = checkpoint(name)
    engine = engine_on(folder, dtype="float32", decode=path)
    assert tokens_of(engine) == expected
    assert [tokens_of(engine, [prompt])[0] for prompt in PROMPTS] == expected


def test_a_model_without_a_fused_step_decodes_layer_by_layer(tmp_path):
    model_type, fields = NEAR_KIN["deepseek_v3"]  # with latents of 24 elements
    folder = write(tmp_path, model_type, **{**SMALL, **fields})
    engine = engine_on(folder, dtype="float32")
    assert tokens_of(engine) == expected_tokens(folder, count=COUNT)
    assert engine.stats().decode.startswith("layer by layer: ")


def step_logits(engine, prompt, tokens, cache):
    """Logits [steps, V] of the tokens behind a prompt, each fed to a step of its own."""
    device, rows = engine.device, []
    with torch.inference_mode():
        assert cache.reserve(0, len(prompt) + len(tokens))
        engine.decoder(Batch([Span(0, 0, len(prompt))], prompt, device), cache)
        for past, token in enumerate(tokens, len(prompt)):
            batch = Batch([Span(0, past, 1)], [token], device)
            if engine.runner.graphs is None:
                rows.append(engine.decoder(batch, cache)[0])
            else:
                flight = engine.runner.graphs.launch(batch)
                flight.tokens()
                rows.append(engine.decoder.head.finish(flight.logits)[0].clone())
    return torch.stack(rows).cpu().double()


def relative_logits(folder, reference, **options) -> float:
    """Relative error of a bfloat16 engine's decode logits against a float32 engine's on the CPU."""
    prompt, tokens = PROMPTS[2], [5, 77, 201, 33, 8]
    cpu = engine_on(reference, device="cpu", decode="layers")
    rows = SlotCache(cpu.cache_shapes, slots=1, max_length=64, dtype=torch.float32, device=torch.device("cpu"))
    expected = step_logits(cpu, prompt, tokens, rows)
    engine = engine_on(folder, dtype="bfloat16", **options)
    engine.generate([prompt], SamplingParams(max_new_tokens=2))
    got = step_logits(engine, prompt, tokens, engine.cache)
    return ((got - expected).norm() / expected.norm()).item()


DENSE_KINDS = ("llama tied, with biases", "qwen3", "glm4", "gemma2", "olmo2", "cohere", "starcoder2")
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe")


@pytest.mark.parametrize("name", DENSE_KINDS + MIXTURES)
def test_bfloat16_logits_agree_with_float32(checkpoint, name):
    folder, _ = checkpoint(name)
    assert relative_logits(folder, folder) < 0.05


def test_mxfp4_experts_stay_packed_and_agree_with_their_values(tmp_path):
    folder = write(tmp_path, "gpt_oss", seed=2, **{**SMALL, **MXFP4_SIZES})
    rewrite(folder, mxfp4_experts, MXFP4)
    assert relative_logits(folder, folder) < 0.05
    engine = engine_on(folder)
    assert engine.stats().weights == "experts MXFP4, the rest bfloat16"
    assert "captured" in engine.stats().decode


def requests(count: int, longest: int) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    prompts = [[draw(0, VOCAB) for _ in range(draw(1, longest))] for _ in range(count)]
    return prompts, [SamplingParams(max_new_tokens=draw(1, 40)) for _ in range(count)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_mixed_lengths_over_page_borders_in_a_tiny_cache_change_no_token(checkpoint, name, path):
    folder, _ = checkpoint(name)
    prompts, params = requests(40, 200)
    cpu = engine_on(folder, device="cpu")
    engine = engine_on(folder, dtype="float32", decode=path, cache_tokens=9 * 64)
    assert tokens_of(engine, prompts, params) == tokens_of(cpu, prompts, params)
    assert all(len(table.free) == 9 for table in engine.cache.tables.of.values())


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_prompt_longer_than_a_step_goes_on_over_its_cached_part(checkpoint, monkeypatch, name):
    folder, _ = checkpoint(name)
    prompts, params = requests(6, 300)
    expected = tokens_of(engine_on(folder, device="cpu"), prompts, params)
    monkeypatch.setattr("shardwise.parallel.engine.STEP_TOKENS", 64)
    for attention in ("triton", "torch"):
        assert tokens_of(engine_on(folder, dtype="float32", attention=attention), prompts, params) == expected


@pytest.mark.parametrize("step_tokens", [2048, 64])
def test_flashinfer_attends_to_prompts_as_triton_does(tmp_path, monkeypatch, step_tokens):
    pytest.importorskip("flashinfer")
    monkeypatch.setattr("shardwise.parallel.engine.STEP_TOKENS", step_tokens)
    folder = write(tmp_path, "llama", **{**SMALL, "head_dim": 64})
    prompts = [prompt * 9 for prompt in PROMPTS]
    params = SamplingParams(max_new_tokens=1)
    texts = {}
    for attention in ("triton", "flashinfer"):
        engine = engine_on(folder, dtype="float16", attention=attention)
        texts[attention] = tokens_of(engine, prompts, params)
        assert attention in engine.stats().cache
    assert texts["triton"] == texts["flashinfer"]


def test_leaving_the_stream_with_a_step_under_way_leaves_a_working_engine(checkpoint):
    folder, expected = checkpoint("llama")
    engine = engine_on(folder, dtype="float32")
    for index, _ in enumerate(engine.stream(PROMPTS, SamplingParams(max_new_tokens=40))):
        if index == 30:
            break
    assert tokens_of(engine) == expected


def test_a_stop_id_ends_an_answer_whose_next_step_was_under_way(checkpoint):
    folder, _ = checkpoint("llama")
    engine = engine_on(folder, dtype="float32")
    free = tokens_of(engine, params=SamplingParams(max_new_tokens=30))
    stop = free[0][7]
    stopped = tokens_of(engine, params=SamplingParams(max_new_tokens=30, stop_token_ids=(stop,)))
    assert stopped == [each[: each.index(stop)] if stop in each else each for each in free]


def test_the_cache_takes_what_the_weights_leave_but_no_more_than_is_useful(checkpoint):
    folder, _ = checkpoint("llama")
    engine = engine_on(folder)
    tokens_of(engine)
    assert engine.stats().cache.startswith("512 pages of 64 tokens, shared by 64 sequences")  # 64 x 512 tokens


def test_a_request_larger_than_the_cache_is_refused(checkpoint):
    folder, _ = checkpoint("llama")
    engine = engine_on(folder, cache_tokens=128)
    with pytest.raises(ValueError, match="may become 240 tokens long .*the cache holds 128;"):
        engine.generate([[1] * 200], SamplingParams(max_new_tokens=40))


LAYOUTS = {
    "llama tied, with biases": [dict(tp=2), dict(tp=1, attn_dp=2)],
    "qwen3": [dict(tp=2)],
    "glm4": [dict(tp=2)],
    "olmo2": [dict(tp=2)],
    "cohere": [dict(tp=2)],
    "qwen3_moe": [dict(tp=2), dict(tp=2, moe_ep=2), dict(tp=1, attn_dp=2, moe_ep=2)],
    "gpt_oss": [dict(tp=2), dict(tp=2, moe_ep=2)],
}
TRANSPORTS = {"demo": ("p2p", "nccl"), "MPI": ("p2p", "nccl")}
CASES = [
    (mode, transport, name, sizes)
    for mode, transports in TRANSPORTS.items()
    for transport in transports
    for name, layouts in LAYOUTS.items()
    for sizes in layouts
    if transport == "p2p" or name == "llama tied, with biases"
]


@pytest.fixture(scope="module")
def ranks(checkpoint):
    """What each rank found in all cases of a mode, which share one job."""
    found = {}

    def of(mode):
        if mode not in found:
            cases = [
                (transport, str(checkpoint(name)[0]), sizes, dict(dtype="float32"), PROMPTS, COUNT)
                for which, transport, name, sizes in CASES
                if which == mode
            ]
            try:
                found[mode] = run_processes(2, "gpu_ranks:generate", cases, mpi=mode == "MPI", timeout=200)
            except Exception as error:  # the cases that follow need not run it again
                found[mode] = error
        if isinstance(found[mode], Exception):
            raise found[mode]
        return found[mode]

    return of


@two_gpus
@pytest.mark.parametrize(("mode", "transport", "name", "sizes"), CASES, ids=str)
def test_two_gpus_give_transformers_tokens(ranks, checkpoint, parity, mode, transport, name, sizes):
    parity(name, ParallelLayout(**sizes), transport)
    number = [case[1:] for case in CASES if case[0] == mode].index((transport, name, sizes))
    for rank in ranks(mode):
        assert not isinstance(rank[number], str), rank[number]
        together, alone, path = rank[number]
        assert together == checkpoint(name)[1] and alone == checkpoint(name)[1]
        exchange = "attn_dp" in sizes and "moe_ep" in sizes  # whose counts pass through the host
        assert ("captured" in path) != exchange, path
