"""Recurrent layers on a GPU: tokens of tiny checkpoints equal Transformers', in batches, chunks and on four ranks.

Those of gated delta layers equal an engine's on the CPU, which are Transformers' (`test_families.py`): where fla is
installed, Transformers calls its kernels for tensors of a CPU too.
"""

import json
import shutil

import pytest
import torch
from families import NEAR_KIN
from tiny import NEW_TOKENS, PROMPTS, VOCAB, expected_tokens, write

from shardwise.comm.rank import current_groups
from shardwise.parallel import engine as engine_module
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DELTA = ("qwen3_next", "qwen3_5")
NAMES = ("bamba", "granite hybrid", "nemotron_h", "nemotron_h with experts", "mamba2", *DELTA)
DELTA_SIZES = dict(head_dim=32, linear_key_head_dim=32, linear_value_head_dim=64)
"""Of heads that the fused step takes."""
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS)
CACHE_TOKENS = 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder and expected tokens of a family, made once."""
    made = {}

    def of(name):
        if name not in made:
            model_type, fields = NEAR_KIN[name]
            sizes = DELTA_SIZES if name in DELTA else {}
            folder = write(tmp_path_factory.mktemp("model"), model_type, **fields | sizes)
            made[name] = folder, on_cpu(folder) if name in DELTA else expected_tokens(folder)
        return made[name]

    return of


def on_cpu(folder) -> list[list[int]]:
    return tokens_of(run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), cache_tokens=1024))[0])


def engine_on(folder, dtype="float32", tp=1, device="cuda", **options) -> Engine:
    return Engine(
        folder,
        plan(folder, tp=tp),
        current_groups(),
        dtype=dtype,
        device=device,
        cache_tokens=CACHE_TOKENS,
        **options,
    )


def tokens_of(engine, prompts=PROMPTS) -> list[list[int]]:
    return [list(each.token_ids) for each in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("path", ["auto", "layers"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_tokens_are_the_expected(checkpoint, name, path):
    folder, expected = checkpoint(name)
    engine = run_threads(1, lambda: engine_on(folder, decode=path))[0]
    assert tokens_of(engine) == expected
    assert [tokens_of(engine, [prompt])[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_shared_slots_give_the_same_tokens(checkpoint, monkeypatch, name):
    folder, expected = checkpoint(name)
    monkeypatch.setattr(engine_module, "STEP_TOKENS", 5)
    monkeypatch.setattr(engine_module, "MAX_BATCH", 2)
    engine = run_threads(1, lambda: engine_on(folder))[0]
    assert tokens_of(engine, PROMPTS * 3) == expected * 3


def test_a_model_that_keeps_states_alone_runs_sequences_of_any_length(checkpoint, tmp_path):
    made, expected = checkpoint("mamba2")
    folder = shutil.copytree(made, tmp_path / "unbounded")
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    engine = run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), dtype="float32", device="cuda"))[0]
    assert tokens_of(engine) == expected
    assert engine.capacity == engine_module.UNBOUNDED_TOKENS
    assert engine.cache.nbytes() == engine.cache.states.nbytes()


@pytest.mark.parametrize(("name", "path"), [*((name, "layers") for name in NAMES), ("qwen3_next", "fused")])
def test_ranks_that_share_groups_of_heads_give_the_same_tokens(checkpoint, name, path):
    folder, expected = checkpoint(name)
    # Threads meet on the host, where no graph can be captured.
    assert run_threads(4, lambda: tokens_of(engine_on(folder, tp=4, decode=path))) == [expected] * 4


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "mamba2", "qwen3_5"])  # without experts, chosen by a rounding
def test_16_bit_logits_are_as_near_to_those_of_float32_as_the_cpus(checkpoint, name):
    """Over many rows: both errors of a row sum hundreds of roundings, which later layers magnify, and their ratio is
    anything from a half to two and more.

    A layer rounds as often on either device, but for the scan's operands, which have 16 bits on a GPU: of all modules'
    own errors, squared and summed over Bamba's layers, the scan's are 6 % there and 2 % on the CPU. Ratios of 40
    checkpoints, five rows each, had a mean of 0.96; means over the rows of one prompt spread by 0.17 in the logarithm,
    so that the one below does by 0.04.
    """
    folder, _ = checkpoint(name)

    def logits(device: str, dtype: str) -> torch.Tensor:
        return logits_of_many(run_threads(1, lambda: engine_on(folder, dtype, device=device))[0]).cpu()

    exact, on_cpu, on_gpu = logits("cpu", "float32"), logits("cpu", "bfloat16"), logits("cuda", "bfloat16")
    ratios = (on_gpu - exact).norm(dim=1) / (on_cpu - exact).norm(dim=1)
    assert ratios.log().mean().exp() < 1.2


def logits_of_many(engine) -> torch.Tensor:
    """[16 * steps, V]: of 16 prompts, and of tokens that follow each one by one."""
    engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=1))
    cache, rows, count = engine.cache, [], 16
    prompts = torch.randint(0, VOCAB, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        assert all(cache.reserve(slot, 20) for slot in range(count))
        for past, ids in [(0, prompts), *((12 + step, [[step * 7]] * count) for step in range(4))]:
            spans = [Span(slot, past, len(own)) for slot, own in enumerate(ids)]
            rows.append(engine.decoder(Batch(spans, sum(ids, []), engine.device), cache))
    return torch.cat(rows)
