"""The operators that stand for ONNX nodes compute what the node documents."""

import oracles_attention as oracle
import pytest
import torch

from shardwise.ops.attention.onnx import torch_onnx_attention_plugin, torch_onnx_gather_nd

HEADS, KV_HEADS, SIZE = 4, 2, 8


def arguments(batch=2, new=3, past=5, dtype=torch.float32, cache_dtype=None, rotary=SIZE, start=(5, 3), total=(8, 5)):
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    angle = torch.rand(batch, 16, rotary // 2, generator=generator) * 6
    q, k, v = (random(batch, new, heads * SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return {
        "q": q, "k": k, "v": v, "past_key_values": random(batch, 2, KV_HEADS, past, SIZE).to(cache_dtype or dtype),
        "context_lengths": torch.tensor(total, dtype=torch.int32),
        "rope_rotary_cos_sin": torch.cat((angle.cos(), angle.sin()), dim=-1),
        "kvcache_start_index": torch.tensor(start, dtype=torch.int32), "enable_tree_attention": 0, "head_size": SIZE,
        "num_kv_heads": KV_HEADS, "num_q_heads": HEADS,
    }  # fmt: skip


def rotated(x, rope, position):
    """x [heads, Dh] turned by row `position` of rope [max_seq, Dr]; element i pairs with i + Dr/2."""
    half = rope.shape[-1] // 2
    angles = rope[position].double()
    phase = torch.complex(angles[:half], angles[half:])
    turned = torch.complex(x[:, :half].double(), x[:, half : 2 * half].double()) * phase
    return torch.cat((turned.real, turned.imag, x[:, 2 * half :].double()), dim=-1)


def expected(given, window=None):
    """Outputs [B, S, N, Dh] in float64 and the present cache."""
    q, past, rope = given["q"], given["past_key_values"], given["rope_rotary_cos_sin"]
    batch, new = q.shape[:2]
    present = torch.cat((past.float(), torch.zeros(batch, 2, KV_HEADS, new, SIZE)), dim=3)
    out = torch.zeros(batch, new, HEADS, SIZE, dtype=torch.float64)
    k, v = (given[n].view(batch, new, KV_HEADS, SIZE) for n in "kv")
    for b in range(batch):
        start, total = int(given["kvcache_start_index"][b]), int(given["context_lengths"][b])
        for t in range(new):
            key = rotated(k[b, t], rope[b % len(rope)], start + t)
            present[b, 0, :, start + t] = key.to(q.dtype).to(past.dtype).float()
            present[b, 1, :, start + t] = v[b, t].to(past.dtype).float()
        for t in range(min(new, total - start)):
            query = rotated(q[b, t].view(HEADS, SIZE), rope[b % len(rope)], start + t)
            at = start + t
            seen = [j <= at and (window is None or at - j < window) for j in range(at + 1)]
            for h in range(HEADS):
                keys, values = (present[b, i, h // 2, : at + 1].double() for i in range(2))
                out[b, t, h] = oracle.attend_one(query[h], keys, values, seen, scale=SIZE**-0.5)
    return out, present


def check(given, window=None, atol=1e-5, **more):
    out, present = torch_onnx_attention_plugin(**given, **more)
    want, want_present = expected(given, window)
    assert out.dtype == given["q"].dtype and present.dtype == given["past_key_values"].dtype
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=atol)
    torch.testing.assert_close(present.float(), want_present, atol=atol, rtol=atol)


@pytest.mark.parametrize("change", [
    {}, {"rotary": 4}, {"start": (0, 0), "total": (3, 2), "past": 0}, {"new": 1, "total": (6, 4)},
    {"start": (1, 0), "total": (4, 0)}, {"new": 0, "total": (5, 3)}, {"rotary": 0},
], ids=str)  # fmt: skip
def test_plugin_rotates_appends_and_attends(change):
    check(arguments(**change))


def test_plugin_shares_one_table_of_angles_and_keeps_the_window():
    given = arguments()
    given["rope_rotary_cos_sin"] = given["rope_rotary_cos_sin"][:1]
    check(given, window=2, sliding_window_size=2)


def test_plugin_with_fp8_cache_and_half_precision():
    check(arguments(cache_dtype=torch.float8_e4m3fn), enable_fp8_kv_cache=1)
    check(arguments(dtype=torch.float16), atol=4e-3)


def test_plugin_takes_parameters_that_require_gradients():
    given = arguments()
    want, _ = expected(given)
    given["past_key_values"].requires_grad_()
    torch.testing.assert_close(torch_onnx_attention_plugin(**given)[0].double(), want, atol=1e-5, rtol=1e-5)


def test_plugin_leaves_its_cache_argument_alone():
    given = arguments()
    before = given["past_key_values"].clone()
    torch_onnx_attention_plugin(**given)
    assert torch.equal(given["past_key_values"], before)


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"enable_tree_attention": 1}, ValueError, "no argument holds the tree's mask"),
    ({"head_size": 7}, ValueError, r"q has shape .* legal: \[B, S, 4 \* 7\]"),
    ({"num_kv_heads": 3}, ValueError, "k has shape"),
    ({"past_key_values": torch.zeros(2, 2, 3, 5, 8)}, ValueError, "past_key_values has shape"),
    ({"enable_fp8_kv_cache": 1}, TypeError, "legal: float8_e4m3fn with 1"),
    ({"rope_rotary_cos_sin": torch.zeros(2, 16, 9)}, ValueError, "Dr even and at most 8"),
    ({"rope_rotary_cos_sin": torch.zeros(2, 6, 8)}, ValueError, "position 7 is beyond"),
    ({"kvcache_start_index": torch.tensor([6, 0])}, ValueError, "kvcache_start_index is .* legal: 0 to 5"),
    ({"context_lengths": torch.tensor([9, 0])}, ValueError, "context_lengths is .* legal: 0 to 8"),
    ({"context_lengths": torch.tensor([1])}, ValueError, "context_lengths has 1 entries; legal: 2"),
    ({"v": torch.zeros(2, 3, 16).half()}, TypeError, "v is torch.float16"),
])  # fmt: skip
def test_plugin_refuses_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        torch_onnx_attention_plugin(**(arguments() | change))


def test_gather_picks_rows_or_elements_also_from_the_end():
    data = torch.arange(30.0).view(2, 5, 3)
    rows = torch.tensor([[0, -1], [2, 2]], dtype=torch.int32)
    want = torch.stack((data[0, [0, 4]], data[1, [2, 2]]))
    assert torch.equal(torch_onnx_gather_nd(data, rows, 1), want)
    assert torch.equal(torch_onnx_gather_nd(data, rows[:, :, None].long(), 1), want)
    elements = torch.tensor([[[4, -1]], [[0, 1]]])
    assert torch.equal(torch_onnx_gather_nd(data, elements, 1), torch.tensor([[14.0], [16.0]]))
    assert torch_onnx_gather_nd(data, rows[:, :0], 1).shape == (2, 0, 3)


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"batch_dims": 0}, ValueError, "batch_dims is 0; legal: 1"),
    ({"data": torch.zeros(2, 5)}, ValueError, r"data has shape \[2, 5\]; legal: \[B, S, E\]"),
    ({"indices": torch.zeros(2, 3)}, TypeError, "indices is torch.float32"),
    ({"indices": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "indices has shape"),
    ({"indices": torch.zeros(2, 3, 3, dtype=torch.int64)}, ValueError, "indices has shape"),
    ({"indices": torch.full((2, 3), 5)}, ValueError, "indices reach from 5 to 5; legal: -5 to 4"),
])  # fmt: skip
def test_gather_refuses_bad_arguments(change, error, words):
    given = {"data": torch.zeros(2, 5, 3), "indices": torch.zeros(2, 3, dtype=torch.int64), "batch_dims": 1}
    with pytest.raises(error, match=words):
        torch_onnx_gather_nd(**(given | change))
