"""Gated delta layers on a GPU: tokens of tiny checkpoints equal those of a CPU, which are Transformers'."""

import pytest
import torch
from families import NEAR_KIN
from test_states_gpu import engine_on, prompt_logits, tokens_of
from tiny import NEW_TOKENS, PROMPTS, write

from shardwise.comm.rank import current_groups
from shardwise.ops.registry import FLA
from shardwise.parallel import engine as engine_module
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = dict(head_dim=32, linear_key_head_dim=32, linear_value_head_dim=64)
NAMES = ("qwen3_next", "qwen3_5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a family, and the tokens of an engine on the CPU."""
    made = {}

    def of(name):
        if name not in made:
            model_type, fields = NEAR_KIN[name]
            folder = write(tmp_path_factory.mktemp("model"), model_type, **fields | SIZES)
            cpu = run_threads(1, lambda: Engine(folder, plan(folder), current_groups(), cache_tokens=1024))[0]
            done = cpu.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS))
            made[name] = folder, [list(each.token_ids) for each in done]
        return made[name]

    return of


@pytest.mark.parametrize("path", ["auto", "layers"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_tokens_equal_the_cpus(checkpoint, name, path):
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


def test_ranks_that_share_key_heads_give_the_same_tokens(checkpoint):
    folder, expected = checkpoint("qwen3_next")
    # Threads wait for each other's streams, which a capture forbids.
    assert run_threads(4, lambda: tokens_of(engine_on(folder, tp=4, decode="fused"))) == [expected] * 4


@pytest.mark.parametrize("fla", [True, False], ids=["fla where it is installed", "our kernels"])
def test_16_bit_logits_are_as_near_to_those_of_float32_as_the_cpus(checkpoint, monkeypatch, fla):
    if not fla:
        monkeypatch.setitem(vars(FLA), "state", (False, "not in this test"))
    folder, _ = checkpoint("qwen3_5")  # without experts, whose choice may hang on a rounding

    def logits(device: str, dtype: str) -> torch.Tensor:
        return prompt_logits(run_threads(1, lambda: engine_on(folder, dtype, device=device))[0]).cpu()

    exact, on_cpu, on_gpu = logits("cpu", "float32"), logits("cpu", "bfloat16"), logits("cuda", "bfloat16")
    assert (on_gpu - exact).norm() < 1.5 * (on_cpu - exact).norm()
