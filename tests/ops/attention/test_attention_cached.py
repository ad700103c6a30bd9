"""Attention over an unpaged cache against a float64 oracle: prefill, chunked prefill, decode, mixed batches."""

import oracles_attention as oracle
import pytest
import torch
from oracles_attention import Step

import shardwise.ops  # noqa: F401  registers the operators
from shardwise.ops.attention import cached
from shardwise.ops.attention.batch import read_batch
from shardwise.ops.attention.reference import torch_cached_attention_with_cache

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-10}
STEPS = {
    "prefill": Step([5, 3], [0, 0], [2, 0]),
    "chunked prefill": Step([4, 3], [5, 1], [1, 3]),
    "decode": Step([1, 1, 1], [6, 0, 3], [0, 3, 1], decode=3),
    "mixed": Step([4, 1, 1], [2, 7, 0], [0, 1, 2], decode=2),
    "zero length": Step([0, 4, 0], [0, 1, 2], [3, 1, 0]),
    "padding": Step([3, 2, 1, 1], [1, 0, 4, 0], [1, -1, 0, -1], decode=2, padding=3),
    "only padding": Step([], [], [], padding=2),
    "empty": Step([], [], []),
}


def build(step, heads=4, kv_heads=2, size=8, value_size=6, dtype=torch.float32, cache_dtype=None, max_seq=12):
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = (
        random(step.tokens, heads, size),
        random(step.tokens, kv_heads, size),
        random(step.tokens, kv_heads, value_size),
    )
    caches = random(4, max_seq, kv_heads, size), random(4, max_seq, kv_heads, value_size)
    return q, k, v, *(cache.to(cache_dtype or dtype) for cache in caches)


def run(step, q, k, v, k_cache, v_cache, scale=None, sinks=None, window=None, cap=None):
    out = torch_cached_attention_with_cache(
        q[None], k[None], v[None], *step.metadata(), k_cache, v_cache, scale, sinks, window, cap
    )
    return out[0]


def check(step, tensors, dtype=torch.float32, **options):
    want, k_want, v_want = oracle.cached_attention(step, *tensors, **options)
    out = run(step, *tensors, **options)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(tensors[3].float(), k_want.float()) and torch.equal(tensors[4].float(), v_want.float())


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_equal_oracle(name, dtype):
    check(STEPS[name], build(STEPS[name], dtype=dtype), dtype)


@pytest.mark.parametrize("seed", range(24))
def test_random_steps_equal_oracle(seed):
    step = oracle.random_step(seed)
    options = [{}, {"window": 3}, {"sinks": torch.linspace(-1, 3, 4)}, {"cap": 2.0, "window": 5}][seed % 4]
    check(step, build(step), **options)


@pytest.mark.parametrize(
    "heads", [{"heads": 4, "kv_heads": 1}, {"heads": 3, "kv_heads": 3}, {"size": 5, "value_size": 9}]
)
@pytest.mark.parametrize("options", [
    {"window": 3}, {"window": 0}, {"cap": 1.5}, {"scale": 0.7}, {"sinks": True},
    {"sinks": True, "window": 2, "cap": 1.0},
], ids=str)  # fmt: skip
def test_heads_and_options(heads, options):
    tensors = build(STEPS["mixed"], **heads)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 3, tensors[0].shape[1]).reshape(-1, 1)
    check(STEPS["mixed"], tensors, **options)


def test_long_prefill_is_scored_in_chunks(monkeypatch):
    monkeypatch.setattr(cached, "QUERY_CHUNK", 2)
    for options in ({}, {"window": 3}):
        check(STEPS["chunked prefill"], build(STEPS["chunked prefill"]), **options)


def test_fp8_cache_is_cast_on_the_way_in_and_out():
    check(STEPS["mixed"], build(STEPS["mixed"], cache_dtype=torch.float8_e4m3fn))


def test_prefill_in_two_chunks_equals_one_prefill():
    whole = Step([6], [0], [1])
    tensors = build(whole)
    want = run(whole, *(x.clone() for x in tensors))
    q, k, v, k_cache, v_cache = tensors
    parts = [
        run(Step([n], [start], [1]), *(x[start : start + n] for x in (q, k, v)), k_cache, v_cache)
        for start, n in ((0, 4), (4, 2))
    ]
    torch.testing.assert_close(torch.cat(parts), want)


def test_flattened_heads_generate_shape_and_long_batch_info():
    step = STEPS["decode"]
    tensors = build(step)
    want = run(step, *(x.clone() for x in tensors))
    q, k, v, k_cache, v_cache = tensors
    info, seq_len, input_pos, slots, _ = step.metadata()
    info = torch.tensor([0, 0, 0, 0, 3, 3, 99], dtype=torch.int32)
    flat = [x.reshape(3, 1, -1) for x in (q, k, v)]
    # A generate-only batch needs neither seq_len nor cu_seqlen; the dispatcher passes None through.
    out = torch.ops.auto_deploy.torch_cached_attention_with_cache(
        *flat, info, None, input_pos, slots.int(), None, k_cache, v_cache, None
    )
    assert out.shape == (3, 1, 24)
    torch.testing.assert_close(out.view(3, 4, 6), want)


def test_extend_sequences_count_as_prefill():
    step = STEPS["mixed"]
    tensors = build(step)
    want = run(step, *(x.clone() for x in tensors))
    q, k, v, k_cache, v_cache = tensors
    _, *rest = step.metadata()
    info = torch.tensor([0, 0, 1, 4, 2, 2], dtype=torch.int32)
    out = torch_cached_attention_with_cache(q[None], k[None], v[None], info, *rest, k_cache, v_cache, None)
    torch.testing.assert_close(out[0], want)


def test_non_contiguous_inputs():
    step = STEPS["mixed"]
    tensors = build(step)
    want = run(step, *(x.clone() for x in tensors))
    strided = [torch.stack((x, x), dim=-1)[..., 0] for x in tensors]
    torch.testing.assert_close(run(step, *strided), want)


def arguments(**change):
    step = STEPS["mixed"]
    q, k, v, k_cache, v_cache = build(step)
    info, seq_len, input_pos, slot_idx, cu_seqlen = step.metadata()
    return {
        "q": q[None], "k": k[None], "v": v[None], "batch_info_host": info, "seq_len": seq_len, "input_pos": input_pos,
        "slot_idx": slot_idx, "cu_seqlen": cu_seqlen, "k_cache": k_cache, "v_cache": v_cache, "scale": None,
    } | change  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"q": torch.zeros(1, 6, 4, 9)}, ValueError, r"q has shape \[1, 6, 4, 9\]; legal: \[1, 6\] followed by heads, 8"),
    ({"q": torch.zeros(1, 6, 3, 8)}, ValueError, "3 query heads over 2 KV heads"),
    ({"k": torch.zeros(1, 5, 2, 8)}, ValueError, "k has shape"),
    ({"v": torch.zeros(1, 6, 3, 6)}, ValueError, "v .* does not hold the cache's 2 heads of size 6"),
    ({"v": torch.zeros(1, 6, 2, 6).half()}, TypeError, "v is torch.float16"),
    ({"k_cache": torch.zeros(4, 12, 16)}, ValueError, r"legal: \[slots, max_seq, Nkv, D\]"),
    ({"v_cache": torch.zeros(4, 11, 2, 6)}, ValueError, "k_cache .* and v_cache"),
    ({"sinks": torch.zeros(2)}, ValueError, "sinks has 2 elements"),
    ({"batch_info_host": torch.tensor([1, 4, 2, 0])}, ValueError, "has 4 entries; legal: 3, or 6"),
    ({"batch_info_host": torch.tensor([1, -4, 2])}, ValueError, "legal: counts >= 0"),
    ({"batch_info_host": torch.tensor([1, 4, 9])}, ValueError, "counts 13 tokens, q holds 6"),
    ({"seq_len": torch.tensor([3, 1, 1])}, ValueError, "legal: an equal sum"),
    ({"seq_len": None}, ValueError, "seq_len is None"),
    ({"batch_info_host": torch.tensor([1.5, 4.0, 2.0])}, TypeError, r"batch_info_host is torch.float32 \[3\]; legal"),
    ({"batch_info_host": torch.tensor([[1, 4, 2]])}, TypeError, r"batch_info_host is torch.int64 \[1, 3\]; legal"),
    ({"batch_info_host": torch.tensor(1)}, TypeError, r"batch_info_host is torch.int64 \[\]; legal"),
    ({"input_pos": torch.tensor([2, 7])}, ValueError, r"input_pos is torch.int64 \[2\]; legal: an integer for each"),
    ({"input_pos": torch.tensor([2.0, 7.0, 0.0])}, ValueError, r"input_pos is torch.float32 \[3\]"),
    ({"slot_idx": torch.tensor([[0, 1, 2]])}, ValueError, r"slot_idx is torch.int64 \[1, 3\]"),
    ({"input_pos": torch.tensor([9, 7, 0])}, ValueError, "leaves the cache of 12 positions"),
    ({"slot_idx": torch.tensor([4, 1, 2])}, ValueError, "slot_idx holds 4; legal: -1"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_the_cache_is_written(change, error, words):
    given = arguments(**change)
    before = given["k_cache"].clone()
    with pytest.raises(error, match=words):
        torch_cached_attention_with_cache(**given)
    assert torch.equal(before, given["k_cache"])


def test_refused_counts_do_not_stand_for_equal_integers_later():
    with pytest.raises(TypeError, match="batch_info_host is torch.float64"):
        read_batch("an operator", torch.tensor([3.0, 5.0, 1.0], dtype=torch.float64))
    assert [type(count) for count in read_batch("an operator", torch.tensor([3, 5, 1]))] == [int] * 3


def test_passes_opcheck():
    torch.library.opcheck(torch.ops.auto_deploy.torch_cached_attention_with_cache, (), arguments())


class _Model(torch.nn.Module):
    def forward(self, q, k, v, info, seq_len, input_pos, slot_idx, cu_seqlen, k_cache, v_cache):
        return torch.ops.auto_deploy.torch_cached_attention_with_cache(
            q, k, v, info, seq_len, input_pos, slot_idx, cu_seqlen, k_cache, v_cache, None, sliding_window_size=3
        )


def test_export_keeps_the_cache_update():
    given = tuple(value for name, value in arguments().items() if name != "scale")
    program = torch.export.export(_Model(), tuple(x.clone() for x in given)).run_decompositions({})
    want_inputs = [x.clone() for x in given]
    want = _Model()(*want_inputs)
    torch.testing.assert_close(program.module()(*given), want)
    torch.testing.assert_close(given[-2:], tuple(want_inputs[-2:]))
