"""Operators on other packages' kernels, with the kernels replaced by stand-ins of the same signature and meaning.

What is proven here is everything around the kernels: batches, slots, padding, states. The kernels themselves run in
the `gpu` tests of the operator table.
"""

from dataclasses import replace
from functools import partial

import pytest
import samples_fla
import samples_mamba
import torch
from mamba_oracle import Batch

from shardwise.ops.fla import delta, fla
from shardwise.ops.mamba import flashinfer as mamba_flashinfer
from shardwise.ops.mamba import ssm
from shardwise.ops.mamba.scan import Prefill
from shardwise.ops.registry import TRITON
from shardwise.ops.rope import flashinfer as rope_flashinfer
from shardwise.ops.triton_support import interpreting
from shardwise.plan_cache import PlanCache

DEVICE = "cpu"
needs_triton = pytest.mark.skipif(not (TRITON.state[0] and interpreting()), reason="needs triton's interpreter")


def chunked(q, k, v, g, beta, scale, tokens, state, bounds=None, chunks=None, offsets=None):
    """fla's chunked form: one row of tokens, sequences between `bounds`; o, undefined behind them, and final states."""
    assert q.shape[0] == 1 and state.dtype == torch.float32
    q, k = delta.match_heads(q, k, v)
    cuts = [0, v.shape[1]] if bounds is None else bounds.tolist()
    assert state.shape[0] == len(cuts) - 1
    if bounds is not None:
        check_chunks(chunks.tolist(), offsets.tolist(), cuts)
    assert cuts[-1] == tokens
    o, states = torch.full_like(v, float("nan")), []
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        one = [t if t is None else t[:, start:stop] for t in (q, k, v, beta, g)]
        o[:, start:stop], new = delta.scan(*one, scale, state[i : i + 1])
        states.append(new)
    return o, torch.cat(states)


def check_chunks(chunks, offsets, cuts):
    """Every chunk of 64 tokens once and in order, then only some that hold no token; where each sequence's begin."""
    lengths = [stop - start for start, stop in zip(cuts, cuts[1:], strict=False)]
    expected = [[i, c] for i, length in enumerate(lengths) for c in range(-(-length // 64))]
    assert chunks[: len(expected)] == expected
    assert offsets == [sum(i < at for i, _ in expected) for at in range(len(cuts))]
    assert all(0 < lengths[i] <= 64 * c for i, c in chunks[len(expected) :])


@pytest.mark.parametrize("changed", ["q", "k", "v"])
def test_fla_is_given_one_dtype_of_16_bits(changed):
    args = dict(zip("qkvb", samples_fla.inputs(False, 1, 3, 2, 2, 16, 16, torch.float16, DEVICE), strict=True))
    args[changed] = args[changed].bfloat16()
    with pytest.raises(TypeError, match="fla_delta_rule: fla's chunked kernels take q, k and v of one dtype"):
        fla.fla_delta_rule(*args.values())
    with pytest.raises(TypeError, match="got torch.float32"):
        fla.fla_delta_rule(*(value.float() for value in args.values()))


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", samples_fla.BATCHES)
def test_fla_batches_states_and_skipped_slots(monkeypatch, gated, name):
    monkeypatch.setattr(fla, "chunked", chunked)
    from memory_check import checked_memory

    batch = samples_fla.BATCHES[name]
    torch.manual_seed(0)
    args = samples_fla.cached_args(gated, batch, v_heads=4, dtype=torch.float16)(DEVICE)
    expected, states = samples_fla.cached(gated, batch)(*args)
    operator = fla.fla_cached_gated_delta_rule if gated else fla.fla_cached_delta_rule
    for _ in range(2):  # by the plan of the first call
        given = [arg.clone() if arg is args[-2] else arg for arg in args]
        with checked_memory(monkeypatch) as seen:
            result = operator(*given)
        assert sum(seen) > 0
        torch.testing.assert_close(result.double().cpu(), expected, rtol=0, atol=5e-3)
        torch.testing.assert_close(given[-2].double().cpu(), states, rtol=0, atol=5e-3)


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
    pad_slot_id=-1,
    out=None,
    computes_padding=True,
):
    """FlashInfer's step, with its demands on strides and dtypes. Its kernels compute rows of padding slots from an
    empty state; what it documents is that they are not processed."""
    heads, size = x.shape[1:]
    assert dt.stride()[1:] == (1, 0) and A.stride() == (1, 0, 0) and D.stride() == (1, 0)
    assert D.dtype == dt.dtype and (dt_bias is None or dt_bias.dtype == dt.dtype)
    assert state_batch_indices.dtype == torch.int32 and state.shape[0] >= x.shape[0] and out.is_contiguous()
    for rows in (x, B, C):
        assert rows.stride()[1:] == (rows.shape[2], 1) and rows.stride(0) * rows.element_size() % 16 == 0
        assert rows.data_ptr() % 16 == 0
    steps = dt[..., 0].float()
    steps = steps if dt_bias is None else steps + dt_bias[:, 0]
    steps = torch.nn.functional.softplus(steps) if dt_softplus else steps
    for row, slot in enumerate(state_batch_indices.tolist()):
        if slot == pad_slot_id and not computes_padding:
            continue
        group = torch.arange(heads) // (heads // B.shape[1])
        s = state[slot].float() if slot != pad_slot_id else torch.zeros_like(state[0], dtype=torch.float32)
        s = s * torch.exp(steps[row][:, None, None] * A)
        s = s + (steps[row][:, None] * x[row])[..., None] * B[row, group][:, None]
        if slot != pad_slot_id:
            state[slot] = s
        out[row] = (s * C[row, group][:, None]).sum(-1) + D * x[row]


@needs_triton
@pytest.mark.parametrize("computes_padding", [True, False])
@pytest.mark.parametrize("limit", [[0.0, float("inf")], samples_mamba.LIMIT])
@pytest.mark.parametrize("name", samples_mamba.BATCHES)
def test_flashinfer_decode_gets_what_it_demands(monkeypatch, limit, name, computes_padding):
    """Inputs of tokens without a slot are infinite or no numbers: they must not show."""
    from memory_check import checked_memory

    batch = samples_mamba.BATCHES[name]
    op = "flashinfer_cached_ssm"
    torch.manual_seed(0)
    args = list(samples_mamba.cached_ssm_args(op, batch, 4, 2, 64, 16, 16, torch.float16, torch.float32)("cpu"))
    args[-2] = limit
    mamba_flashinfer_prefill(monkeypatch, batch, limit)
    for number, slot in enumerate(batch.slots[len(batch.prefill) :]):
        if slot == -1:
            for place, value in ((0, float("nan")), (2, float("inf")), (3, float("nan")), (5, float("nan"))):
                args[place].flatten(0, 1)[sum(batch.prefill) + number] = value
    expected, states = samples_mamba.cached_ssm(batch)(*args)
    update = partial(selective_state_update, computes_padding=computes_padding)
    monkeypatch.setattr(mamba_flashinfer, "_update", lambda: update)
    with checked_memory(monkeypatch):
        result = mamba_flashinfer.flashinfer_cached_ssm(*args)
    torch.testing.assert_close(result.double(), expected, rtol=5e-3, atol=2e-2)
    torch.testing.assert_close(args[-3].double(), states, rtol=5e-3, atol=5e-3)


@needs_triton
@pytest.mark.parametrize("skew", [0, 1, 8], ids=["aligned", "off by an element", "off by a vector"])
@pytest.mark.parametrize("decode", [(0, 3), (5, 2)], ids=["decode", "mixed"])
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16])
def test_flashinfer_decode_reads_parts_of_wider_rows(monkeypatch, vectors, decode, skew):
    """As a layer has them: input, B and C are slices of one projection's rows, vectors in float32 or not."""
    prefill, count = decode
    batch = Batch((prefill,) if prefill else (), count, tuple(range(bool(prefill) + count)), (True,) * bool(prefill))
    torch.manual_seed(0)
    args = list(samples_mamba.cached_ssm_args("x", batch, 4, 2, 64, 16, 16, torch.float16, torch.float32)("cpu"))
    args[1], args[4] = args[1].to(vectors), args[4].to(vectors)
    expected, _ = samples_mamba.cached_ssm(batch)(*args)
    for place in (0, 2, 3):
        rows = args[place]
        wide = torch.full((*rows.shape[:2], rows[0, 0].numel() + 16), float("nan"), dtype=rows.dtype)
        wide[..., skew : skew + rows[0, 0].numel()] = rows.flatten(2)
        args[place] = wide[..., skew : skew + rows[0, 0].numel()].unflatten(2, rows.shape[2:])
    mamba_flashinfer_prefill(monkeypatch, batch, args[-2])
    monkeypatch.setattr(mamba_flashinfer, "_update", lambda: selective_state_update)
    monkeypatch.setattr(mamba_flashinfer, "BACKEND", replace(mamba_flashinfer.BACKEND, plans=PlanCache()))
    monkeypatch.setattr(mamba_flashinfer, "BLOCK", 16)  # several programs copy a row
    caches = [args[-3].clone() for _ in range(2)]
    for cache in caches:
        result = mamba_flashinfer.flashinfer_cached_ssm(*args[:-3], cache, *args[-2:])
        torch.testing.assert_close(result.double(), expected, rtol=5e-3, atol=2e-2)
        monkeypatch.delattr(ssm, "prepare", raising=False)  # the second call finds its launches kept
    assert torch.equal(*caches)


@needs_triton
def test_steps_beside_prompts_of_any_length_share_what_flashinfer_reads(monkeypatch):
    monkeypatch.setattr(mamba_flashinfer, "_update", lambda: selective_state_update)
    mamba_flashinfer._rows_for.cache_clear()
    for length in (5, 9):
        batch = Batch((length,), 2, (0, 1, 2), (True,))
        args = samples_mamba.cached_ssm_args("x", batch, 4, 2, 64, 16, 16, torch.float16, torch.float32)("cpu")
        expected, _ = samples_mamba.cached_ssm(batch)(*args)
        mamba_flashinfer_prefill(monkeypatch, batch, args[-2])
        result = mamba_flashinfer.flashinfer_cached_ssm(*args)
        torch.testing.assert_close(result.double(), expected, rtol=5e-3, atol=2e-2)
    assert mamba_flashinfer._rows_for.cache_info().currsize == 1


def mamba_flashinfer_prefill(monkeypatch, batch, limit):
    """Prefill by the reference, so that this test also runs where Triton is missing."""
    first = sum(batch.prefill)
    info = torch.tensor([len(batch.prefill), first, 0])

    def prefill(tensors):
        x, dt, dt_bias, A, B, C, D, slots, cache, bounds, resumes, *_, out, _room, _word = tensors
        x, B, C, dt = (t.flatten(0, 1)[None, :first] for t in (x, B, C, dt))
        out.flatten(0, 1)[:first] = torch.ops.auto_deploy.torch_cached_ssm(
            x, A, B, C, D, dt, dt_bias, info, bounds, bounds, slots, resumes, cache, limit, 16
        )[0]

    monkeypatch.setattr(ssm, "plan_prefill", lambda *_: Prefill(prefill, lambda: None, None))


@pytest.mark.parametrize("lead", [(1, 6), (6, 1), (2, 3), (6,)])
@pytest.mark.parametrize("skew", [0, 1, 8])
@pytest.mark.parametrize("index", [torch.int32, torch.int64, torch.int16])
def test_flashinfer_rope_gets_flat_aligned_rows_and_gives_the_shapes_it_was_given(monkeypatch, lead, skew, index):
    """`skew` elements in front of every head."""
    q, k = (torch.randn(*lead, heads, skew + 64).half()[..., skew:] for heads in (4, 2))
    table, positions = torch.randn(9 * 64 + skew)[skew:].view(9, 64), (torch.arange(6) % 5).view(lead).to(index)

    def apply(positions, query, key, head_size, cos_sin_cache, is_neox):
        assert positions.shape == (6,) and positions.dtype in (torch.int32, torch.int64) and positions.is_contiguous()
        assert all(rows.is_contiguous() and rows.data_ptr() % 16 == 0 for rows in (query, key, cos_sin_cache))
        factor = cos_sin_cache[positions.long(), 0].half()
        results = (rows.view(6, -1, head_size) * factor[:, None, None] for rows in (query, key))
        return tuple(result.view(rows.shape) for result, rows in zip(results, (query, key), strict=True))

    monkeypatch.setattr(rope_flashinfer, "_function", lambda: apply)
    for _ in range(2):
        results = rope_flashinfer.flashinfer_rope(q, k, positions, table)
        for result, given in zip(results, (q, k), strict=True):
            expected = given * table[positions.long(), 0].half()[..., None, None]
            assert torch.equal(result, expected) and result.is_contiguous()
