"""Recorded calls of fla's chunked kernels give what these give as they are written, bit by bit."""

from functools import partial

import pytest
import samples_fla
import torch
from mamba_oracle import Batch
from recorded_calls import beside_and_captured, tapes_of

import shardwise.ops  # noqa: F401  (registers the operators)
from shardwise.ops.fla import chunked as module
from shardwise.ops.fla.chunked import chunked
from shardwise.ops.registry import FLA
from shardwise.ops.tape import Tape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not FLA.state[0], reason=FLA.state[1]),
]
SIZES = {"v_heads": 4, "K": 64, "V": 64, "dtype": torch.bfloat16}
ONE = Batch(prefill=(70,), decode=0, slots=(3,), resumes=(True,))
SEVERAL = Batch(prefill=(70, 0, 11, 64), decode=0, slots=(4, 6, 0, -1), resumes=(True, False, False, True))
MIXED = samples_fla.MIXED
BATCHES = {"one": ONE, "several": SEVERAL, "mixed": MIXED}


@pytest.fixture(autouse=True)
def first_form(monkeypatch):
    """fla compiles and times dozens of forms of each kernel; any will do."""
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **options: [0.0] * 3)


@pytest.fixture
def tapes():
    """Of the calls that a test made."""
    layouts = module._replayed.layouts
    layouts.clear()
    return partial(tapes_of, layouts)


def as_written(monkeypatch, operator, args):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_replayed", module._steps)
        return operator(*args)


@pytest.mark.parametrize("gated", [False, True])
def test_prompts_without_a_cache(monkeypatch, tapes, gated):
    operator = getattr(torch.ops.auto_deploy, f"fla_{'gated_' * gated}delta_rule")
    kept = []
    for _ in range(5):
        args = samples_fla.plain_args(gated, **SIZES)("cuda")
        kept.append((args, operator(*args)))
    assert [type(tape) for tape in tapes()] == [Tape]
    for args, result in kept:
        assert torch.equal(result, as_written(monkeypatch, operator, args))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_steps_with_a_cache(monkeypatch, tapes, name, gated):
    operator = getattr(torch.ops.auto_deploy, f"fla_cached_{'gated_' * gated}delta_rule")
    kept = []
    for _ in range(5):
        args = samples_fla.cached_args(gated, BATCHES[name], **SIZES)("cuda")
        before = args[-2].clone()
        kept.append(((*args[:-2], before, args[-1]), operator(*args), args[-2]))
    assert [type(tape) for tape in tapes()] == [Tape]
    for args, result, states in kept:
        assert torch.equal(result, as_written(monkeypatch, operator, args))
        assert torch.equal(states, args[-2])


def test_other_streams_and_graphs_have_calls_of_their_own(tapes):
    args = list(samples_fla.plain_args(True, **SIZES)("cuda"))
    operator = torch.ops.auto_deploy.fla_gated_delta_rule
    expected = [operator(*args) for _ in range(3)][-1].clone()
    beside, graph, captured = beside_and_captured(lambda: operator(*args))
    args[2].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert len(tapes()) == 2 and all(torch.equal(result, expected) for result in beside)
    assert torch.equal(captured, operator(*args))


@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_wider_tensors_are_copied_and_recorded(tapes, gated):
    operator = getattr(torch.ops.auto_deploy, f"fla_{'gated_' * gated}delta_rule")
    args = list(samples_fla.plain_args(gated, **SIZES)("cuda"))
    expected = operator(*args)
    wide = [torch.cat((t, t), -2)[..., : t.shape[-2], :] if t is not None and t.dim() == 4 else t for t in args]
    for _ in range(4):
        assert torch.equal(operator(*wide), expected)
    assert [type(tape) for tape in tapes()] == [Tape]


def test_fla_computes_the_same_by_its_own_function():
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta, *_ = samples_fla.plain_args(True, **SIZES)("cuda")
    state = torch.randn(2, 4, 64, 64, device="cuda")
    expected = chunk_gated_delta_rule(q, k, v, g, beta, 0.3, initial_state=state, output_final_state=True)
    for _ in range(4):
        results = chunked(q, k, v, g, beta, 0.3, v.shape[1], state)
        assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
