"""The plain PyTorch attention operators against a float64 oracle, on CPU."""

import oracles_attention as oracle
import pytest
import torch

import shardwise.ops  # noqa: F401  registers the operators
from shardwise.ops.attention.reference import torch_attention, torch_attention_repeat_kv, torch_attention_sdpa

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def qkv(batch=2, heads=4, kv_heads=2, queries=5, keys=5, size=8, value_size=8, dtype=torch.float32):
    return tensors((batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size),
                   dtype=dtype)  # fmt: skip


def check(out, want, dtype=torch.float32):
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"size": 7, "value_size": 3}, {"queries": 1}, {"queries": 2, "keys": 9}],
    ids=str,
)
def test_attention_equals_oracle(shape, dtype):
    q, k, v = qkv(**shape, dtype=dtype)
    check(torch_attention(q, k, v, is_causal=True), oracle.attention(q, k, v, causal=True), dtype)


@pytest.mark.parametrize("keys", [5, 9, 3])
@pytest.mark.parametrize("options", [
    {"causal": True}, {"window": 3}, {"window": 3, "causal": True}, {"window": 0}, {"cap": 1.5},
    {"cap": 2.0, "causal": True},
    {"sinks": True}, {"sinks": True, "window": 2, "cap": 1.0}, {"scale": 0.3},
], ids=str)  # fmt: skip
def test_attention_options(options, keys):
    q, k, v = qkv(keys=keys)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor([0.5, -1.0, 2.0, 30.0]).reshape(1, 4, 1)
    names = {"causal": "is_causal", "window": "sliding_window", "cap": "logit_cap"}
    out = torch_attention(q, k, v, **{names.get(name, name): value for name, value in options.items()})
    check(out, oracle.attention(q, k, v, **options))


def test_queries_without_a_visible_key_give_zero():
    q, k, v = qkv(queries=5, keys=3)
    assert not torch_attention(q, k, v, is_causal=True)[:, :, :2].any()
    mask = torch.ones(2, 1, 5, 3, dtype=torch.bool)
    mask[1, :, 4] = False
    out = torch_attention(q, k, v, attn_mask=mask)
    assert not out[1, :, 4].any() and out[0].any()


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (1, 1, 5, 5), (2, 1, 1, 5)])
@pytest.mark.parametrize("kind", ["bool", "additive", "additive64"])
def test_masks_broadcast_and_follow_the_cap(shape, kind):
    q, k, v = qkv()
    (mask,) = tensors(shape, seed=3)
    if kind == "bool":
        mask = mask > -0.5
    elif kind == "additive64":
        mask = mask.double()
    out = torch_attention(q, k, v, attn_mask=mask, logit_cap=1.0)
    check(out, oracle.attention(q, k, v, mask=mask.expand(2, 4, 5, 5), cap=1.0))


def test_layout_bsnd_swaps_the_middle_dimensions():
    q, k, v = qkv(value_size=6, queries=4)
    want = torch_attention(q, k, v, is_causal=True).transpose(1, 2)
    out = torch_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, layout="bsnd")
    assert out.is_contiguous()
    torch.testing.assert_close(out, want)


def test_inputs_may_be_strided_views_and_empty():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    torch.testing.assert_close(torch_attention(q, k, v), torch_attention(*(x.contiguous() for x in (q, k, v))))
    assert torch_attention(*qkv(batch=0)).shape == (0, 4, 5, 8)
    assert not torch_attention(*qkv(keys=0)).any()
    assert torch_attention(*qkv(queries=0)).numel() == 0


def test_sdpa_is_the_torch_function():
    q, k, v = qkv(keys=9)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(torch_attention_sdpa(q, k, v, is_causal=True, scale=0.2, enable_gqa=True), want)
    check(torch_attention_sdpa(q, k, v, enable_gqa=True), oracle.attention(q, k, v))


@pytest.mark.parametrize("repeats", [1, 3])
def test_repeat_kv_equals_repeat_interleave_and_never_aliases(repeats):
    (hidden,) = tensors((2, 3, 4, 5))
    strided = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (hidden, strided):
        out = torch_attention_repeat_kv(given, repeats)
        torch.testing.assert_close(out, hidden.repeat_interleave(repeats, dim=1))
        assert out.is_contiguous() and out.data_ptr() != given.data_ptr()


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"layout": "sbnd"}, ValueError, "layout is 'sbnd'; legal: 'bnsd', 'bsnd'"),
    ({"key": torch.zeros(2, 3, 5, 8), "value": torch.zeros(2, 3, 5, 8)}, ValueError, "4 query heads over 3 KV heads"),
    ({"key": torch.zeros(2, 2, 5, 9)}, ValueError, "do not fit"),
    ({"value": torch.zeros(2, 2, 6, 8)}, ValueError, "do not fit"),
    ({"query": torch.zeros(2, 5, 8)}, ValueError, "do not fit"),
    ({"key": torch.zeros(2, 2, 5, 8, dtype=torch.float16)}, TypeError, "one dtype"),
    ({"query": torch.zeros(2, 4, 5, 8, dtype=torch.int32)}, TypeError, "query is torch.int32"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks has 3 elements"),
    ({"attn_mask": torch.zeros(3, 1, 1, 1)}, ValueError, r"attn_mask has shape \[3, 1, 1, 1\]; legal"),
])  # fmt: skip
def test_attention_refuses_bad_arguments(change, error, words):
    q, k, v = qkv()
    with pytest.raises(error, match=words):
        torch_attention(**({"query": q, "key": k, "value": v} | change))


def test_the_others_refuse_bad_arguments():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="enable_gqa=True"):
        torch_attention_sdpa(q, k, v)
    with pytest.raises(ValueError, match=r"query has shape .* legal: \[B, N, S, D\]"):
        torch_attention_sdpa(q[0], k, v)
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        torch_attention_sdpa(q, k, v, attn_mask=torch.zeros(5, 5), is_causal=True, enable_gqa=True)
    with pytest.raises(ValueError, match=r"attn_mask has shape \[9, 9\]; legal: .*, or 1 where it is shared"):
        torch_attention_sdpa(q, k, v, attn_mask=torch.zeros(9, 9), enable_gqa=True)
    with pytest.raises(TypeError, match="attn_mask is torch.int64; legal: bool, float32"):
        torch_attention_sdpa(q, k, v, attn_mask=torch.zeros(1, 1, dtype=torch.int64), enable_gqa=True)
    with pytest.raises(TypeError, match="value is torch.float16, query is torch.float32; legal: one dtype"):
        torch_attention_sdpa(q, k, v.half(), enable_gqa=True)
    with pytest.raises(ValueError, match=r"key .* do not fit"):
        torch_attention_sdpa(q, k[..., :-1], v, enable_gqa=True)
    with pytest.raises(ValueError, match="n_rep is 0"):
        torch_attention_repeat_kv(k, 0)
    with pytest.raises(ValueError, match=r"legal: \[B, Nkv, S, D\]"):
        torch_attention_repeat_kv(k[0], 2)


@pytest.mark.parametrize("layout", ["bnsd", "bsnd"])
def test_operators_pass_opcheck(layout):
    q, k, v = qkv(value_size=6, kv_heads=4) if layout == "bnsd" else qkv(heads=5, queries=4, keys=4, kv_heads=4)
    library = torch.ops.auto_deploy
    torch.library.opcheck(library.torch_attention, (q, k, v), {"is_causal": True, "layout": layout})
    if layout == "bnsd":
        torch.library.opcheck(library.torch_attention_sdpa, (q, k, v))
        torch.library.opcheck(library.torch_attention_repeat_kv, (k, 2))


class _Model(torch.nn.Module):
    def forward(self, q, k, v):
        k = torch.ops.auto_deploy.torch_attention_repeat_kv(k, 2)
        v = torch.ops.auto_deploy.torch_attention_repeat_kv(v, 2)
        return torch.ops.auto_deploy.torch_attention(q, k, v, None, 0.0, True, sliding_window=3)


def test_export_round_trip():
    arguments = tuple(qkv())
    program = torch.export.export(_Model(), arguments)
    torch.testing.assert_close(program.module()(*arguments), _Model()(*arguments))
