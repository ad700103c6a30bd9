"""The plain PyTorch MLA operators against a float64 oracle."""

import oracles_attention as oracle
import pytest
import torch
from oracles_attention import Step

import shardwise.ops  # noqa: F401  registers the operators
from shardwise.ops.mla import reference
from shardwise.ops.mla.reference import torch_cached_mla_with_cache, torch_mla

TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS, NOPE, ROPE, VALUE, RANK = 3, 8, 4, 6, 10
STEPS = {
    "prefill": Step([5, 3], [0, 0], [2, 0]),
    "chunked prefill": Step([4, 3], [5, 1], [1, 3]),
    "decode": Step([1, 1, 1], [6, 0, 3], [0, 3, 1], decode=3),
    "mixed": Step([4, 1, 1], [2, 7, 0], [0, 1, 2], decode=2),
    "zero length": Step([0, 4, 0], [0, 1, 2], [3, 1, 0]),
    "padding": Step([3, 2, 1, 1], [1, 0, 4, 0], [1, -1, 0, -1], decode=2, padding=3),
    "empty": Step([], [], []),
}


def random(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def weight(dtype=torch.float32):
    return random(HEADS * (NOPE + VALUE), RANK, dtype=dtype) / RANK**0.5


def build(tokens, dtype=torch.float32):
    """q_nope, q_pe, compressed_kv, kpe, weight of flat tokens, as [1, T, ...]."""
    return (random(1, tokens, HEADS, NOPE, dtype=dtype), random(1, tokens, HEADS, ROPE, dtype=dtype),
            random(1, tokens, RANK, dtype=dtype), random(1, tokens, 1, ROPE, dtype=dtype), weight(dtype))  # fmt: skip


def want_uncached(q_nope, q_pe, latent, kpe, w, causal, scale=None):
    batches = []
    for b in range(len(latent)):
        keys, values = oracle.expand_latent(latent[b], kpe[b, :, 0], w, HEADS, NOPE)
        query = torch.cat((q_nope[b], q_pe[b]), dim=-1)
        parts = [x.transpose(0, 1)[None] for x in (query, keys, values)]
        batches.append(oracle.attention(*parts, causal=causal, scale=scale)[0].transpose(0, 1))
    return torch.stack(batches)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("causal", "queries", "keys", "scale"), [
    (True, 5, 5, None), (False, 5, 5, 0.2), (True, 2, 6, None), (True, 6, 2, None), (True, 1, 4, None),
])  # fmt: skip
def test_mla_equals_oracle_in_both_layouts(dtype, causal, queries, keys, scale):
    q_nope, q_pe, _, _, w = (x.expand(2, *x.shape[1:]) if x.dim() == 4 else x for x in build(queries, dtype))
    latent, kpe = random(2, keys, RANK, dtype=dtype), random(2, keys, 1, ROPE, dtype=dtype)
    want = want_uncached(q_nope, q_pe, latent, kpe, w, causal, scale)
    out = torch_mla(q_nope, q_pe, latent, kpe, w, causal, scale)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    swapped = torch_mla(
        *(x.transpose(1, 2) for x in (q_nope, q_pe)), latent, kpe.transpose(1, 2), w, causal, scale, "bnsd"
    )
    assert swapped.is_contiguous()
    torch.testing.assert_close(swapped.transpose(1, 2), out)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cached_steps_equal_oracle(name, dtype):
    step = STEPS[name]
    tensors = build(step.tokens, dtype)
    cache = random(4, 12, RANK + ROPE, dtype=dtype)
    q_nope, q_pe, latent, kpe, w = tensors
    want, cache_want = oracle.cached_mla(step, q_nope[0], q_pe[0], latent[0], kpe[0, :, 0], w, cache)
    out = torch_cached_mla_with_cache(*tensors, *step.metadata(), cache, kv_lora_rank=RANK)
    assert out.dtype == dtype and out.shape == (1, step.tokens, HEADS, VALUE)
    torch.testing.assert_close(out[0].double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(cache, cache_want)


def test_long_prefill_is_scored_in_chunks(monkeypatch):
    step = STEPS["chunked prefill"]
    tensors, cache = build(step.tokens), random(4, 12, RANK + ROPE)
    want = torch_cached_mla_with_cache(*tensors, *step.metadata(), cache.clone(), 0.3, RANK)
    monkeypatch.setattr(reference, "QUERY_CHUNK", 2)
    torch.testing.assert_close(torch_cached_mla_with_cache(*tensors, *step.metadata(), cache, 0.3, RANK), want)


def test_absorbed_decode_equals_expanded_prefill_of_one_token():
    decode, prefill = Step([1], [6], [2], decode=1), Step([1, 1], [6, 0], [2, -1])
    tensors, cache = build(1), random(4, 12, RANK + ROPE)
    want = torch_mla(*tensors[:2], *_with_prefix(tensors, cache), tensors[4])
    out = torch_cached_mla_with_cache(*tensors, *decode.metadata(), cache.clone(), None, RANK)
    torch.testing.assert_close(out, want)
    tensors = build(2)
    both = torch_cached_mla_with_cache(*tensors, *prefill.metadata(), cache, None, RANK)
    assert both[0, 0].any() and not both[0, 1].any()


def _with_prefix(tensors, cache):
    rows = torch.cat((cache[2, :6], torch.cat((tensors[2][0], tensors[3][0, :, 0]), dim=-1)))
    return rows[None, :, :RANK], rows[None, :, None, RANK:]


def test_generate_shape_fp8_cache_and_none_metadata():
    step = STEPS["decode"]
    tensors, cache = build(3), random(4, 12, RANK + ROPE).to(torch.float8_e4m3fn)
    want, cache_want = oracle.cached_mla(step, tensors[0][0], tensors[1][0], tensors[2][0], tensors[3][0, :, 0],
                                         tensors[4], cache)  # fmt: skip
    info, _, input_pos, slots, _ = step.metadata()
    rows = [x.transpose(0, 1) for x in tensors[:4]]
    out = torch.ops.auto_deploy.torch_cached_mla_with_cache(
        *rows, tensors[4], info, None, input_pos, slots, None, cache, None, RANK
    )
    assert out.shape == (3, 1, HEADS, VALUE)
    torch.testing.assert_close(out[:, 0].double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.float(), cache_want.float())


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"q_nope": torch.zeros(1, 5, 2, NOPE)}, ValueError, "q_nope .* and q_pe"),
    ({"q_pe": torch.zeros(5, HEADS, ROPE)}, ValueError, "q_pe has shape .* legal: 4 dimensions"),
    ({"kpe": torch.zeros(1, 5, 2, ROPE)}, ValueError, "one rotated key"),
    ({"compressed_kv": torch.zeros(1, 4, RANK)}, ValueError, "do not fit"),
    ({"kv_b_proj_weight": torch.zeros(HEADS * NOPE, RANK)}, ValueError, "kv_b_proj_weight has shape"),
    ({"kv_b_proj_weight": torch.zeros(HEADS * 14, RANK + 1)}, ValueError, "kv_b_proj_weight has shape"),
    ({"kpe": torch.zeros(1, 5, 1, ROPE).half()}, TypeError, "kpe is torch.float16"),
])  # fmt: skip
def test_bad_tensors_are_refused(change, error, words):
    names = ("q_nope", "q_pe", "compressed_kv", "kpe", "kv_b_proj_weight")
    given = dict(zip(names, build(5), strict=True)) | change
    with pytest.raises(error, match=words):
        torch_mla(**given)


def test_bad_layout_cache_and_metadata_are_refused():
    tensors, step = build(5), Step([5], [0], [0])
    with pytest.raises(ValueError, match="layout is 'sbnd'"):
        torch_mla(*tensors, layout="sbnd")
    with pytest.raises(ValueError, match=r"legal: R = kv_lora_rank and \[slots, max_seq, R \+ Dr\]"):
        torch_cached_mla_with_cache(*tensors, *step.metadata(), torch.zeros(2, 8, RANK + ROPE))
    with pytest.raises(ValueError, match=r"legal: R = kv_lora_rank"):
        torch_cached_mla_with_cache(*tensors, *step.metadata(), torch.zeros(2, 8, RANK), kv_lora_rank=RANK)
    with pytest.raises(ValueError, match="leaves the cache of 4 positions"):
        torch_cached_mla_with_cache(*tensors, *step.metadata(), torch.zeros(2, 4, RANK + ROPE), kv_lora_rank=RANK)


class _Model(torch.nn.Module):
    def forward(self, q_nope, q_pe, latent, kpe, w, info, seq_len, input_pos, slots, cu_seqlen, cache):
        library = torch.ops.auto_deploy
        whole = library.torch_mla(q_nope, q_pe, latent, kpe, w)
        return whole + library.torch_cached_mla_with_cache(
            q_nope, q_pe, latent, kpe, w, info, seq_len, input_pos, slots, cu_seqlen, cache, None, RANK
        )


def test_opcheck_and_export_round_trip():
    step, cache = STEPS["mixed"], random(4, 12, RANK + ROPE)
    tensors, library = build(step.tokens), torch.ops.auto_deploy
    torch.library.opcheck(library.torch_mla, tensors)
    arguments = (*tensors, *step.metadata(), cache)
    torch.library.opcheck(library.torch_cached_mla_with_cache, (*arguments, None, RANK))
    program = torch.export.export(_Model(), tuple(x.clone() for x in arguments)).run_decompositions({})
    want = _Model()(*arguments[:-1], cache.clone())
    torch.testing.assert_close(program.module()(*arguments), want)
