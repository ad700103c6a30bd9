"""The fused decode step computes what the decoder computes. Without a GPU its kernels run in Triton's interpreter."""

import threading

import pytest
import torch
from tiny import write

from shardwise.comm.rank import current_groups
from shardwise.ops.triton_support import interpreting
from shardwise.parallel import decode_step
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import SlotCache
from shardwise.parallel.decode_step import DecodeStep, reason_against
from shardwise.parallel.engine import Engine
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)
FAMILIES = {
    "llama": ("llama", dict(head_dim=32)),
    "llama with biases": ("llama", dict(head_dim=32, attention_bias=True, mlp_bias=True)),
    "mistral with a window": ("mistral", dict(head_dim=32, sliding_window=5)),
    "qwen3": ("qwen3", dict(head_dim=32, attention_bias=False)),
}
PROMPTS = {2: [5, 17, 200, 3, 9, 44, 81], 0: [7], 1: [250, 1, 30, 12, 99, 6]}
"""By cache slot."""


def _caches(engine):
    for _ in range(2):
        yield SlotCache(engine._cache_shapes, slots=4, max_length=64, dtype=engine.dtype, device=DEVICE)


def _lay_out_as_on_a_gpu(decoder):
    """Weights as rows [out, in], which the kernels stream; the CPU keeps panels."""
    layers = decoder.layers
    linears = [part for x in layers for part in (x.mixer.qkv, x.mixer.out, x.feed_forward.gate_up, x.feed_forward.down)]
    for linear in (*linears, decoder.head.linear):
        linear._matrix = linear.weight.t().contiguous().t()
        linear.panels = linear._matrix[None]


@torch.inference_mode()
def _compare(folder, world, batch_sizes):
    """Largest relative error of the step's logits over some steps, both paths fed the same tokens."""
    planned = plan(str(folder), tp=world)
    engine = Engine(str(folder), planned, current_groups(), dtype=torch.float16, device=DEVICE)
    _lay_out_as_on_a_gpu(engine._decoder)
    plain, fused = _caches(engine)
    for slot, prompt in PROMPTS.items():
        for cache in (plain, fused):
            engine._decoder(Batch([Span(slot, 0, len(prompt))], prompt, DEVICE), cache)
    step = DecodeStep(engine._decoder, fused, max_batch=4)
    past = {slot: len(prompt) for slot, prompt in PROMPTS.items()}
    worst = 0.0
    for number, size in enumerate(batch_sizes):
        slots = list(PROMPTS)[:size]
        tokens = [(31 * number + 7 * slot) % 250 for slot in slots]
        expected = engine._decoder(Batch([Span(s, past[s], 1) for s in slots], tokens, DEVICE), plain)
        padding = 4 - size if size > 2 else 0
        got = step(
            torch.tensor(tokens + [0] * padding, device=DEVICE),
            torch.tensor([past[s] for s in slots] + [-1] * padding, dtype=torch.int32, device=DEVICE),
            torch.tensor(slots + [0] * padding, dtype=torch.int32, device=DEVICE)[:, None],
        )
        worst = max(worst, ((got[:size] - expected).norm() / expected.norm()).item())
        for slot in slots:
            past[slot] += 1
    return worst


@pytest.fixture(autouse=True)
def one_launch_at_a_time(monkeypatch):
    """Ranks are threads here, and the interpreter keeps the grid position in one place for the process."""
    lock = threading.Lock()
    for name in ("skinny_linear", "fused_decode_attention"):
        launch = getattr(decode_step, name)

        def locked(*args, launch=launch, **options):
            with lock:
                return launch(*args, **options)

        monkeypatch.setattr(decode_step, name, locked)


@pytest.mark.parametrize("family, world", [*((family, 1) for family in FAMILIES), ("llama with biases", 2)])
def test_logits_equal_the_decoders(family, world, tmp_path):
    model_type, fields = FAMILIES[family]
    folder = write(tmp_path, model_type, num_hidden_layers=1, **fields)
    for worst in run_threads(world, _compare, folder, world, [2, 3]):
        assert worst < 1e-2


def test_a_head_size_without_a_kernel_is_named(tmp_path):
    folder = write(tmp_path, "llama", num_hidden_layers=1, head_dim=16)

    def build():
        engine = Engine(str(folder), plan(str(folder)), current_groups(), dtype=torch.float16, device=DEVICE)
        return reason_against(engine._decoder, next(_caches(engine)))

    assert run_threads(1, build) == ["layer 0: head sizes 16 and 16, need one power of two from 32 to 256"]
