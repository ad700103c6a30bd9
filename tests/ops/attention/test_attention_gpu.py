"""What only a GPU can show of the Triton attention operator: real tiles, graphs, caches beyond 2^31 elements."""

import pytest
import torch
from oracles_attention import Step

import shardwise.ops  # noqa: F401  registers the operators
from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.ops.attention.triton import attend_to_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OP = torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def build(step, heads, kv_heads, size, value_size, dtype, slots=4, max_seq=2048):
    generator = torch.Generator(device="cuda").manual_seed(11)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    q, k = random(1, step.tokens, heads, size), random(1, step.tokens, kv_heads, size)
    v = random(1, step.tokens, kv_heads, value_size)
    return q, k, v, random(slots, max_seq, kv_heads, size), random(slots, max_seq, kv_heads, value_size)


def want(step, q, k, v, k_cache, v_cache, sinks=None, window=None, scale=None, cap=None):
    """The plain PyTorch operator in float64, on the GPU."""
    wide = [x.double() for x in (q, k, v, k_cache, v_cache)]
    return torch_cached_attention_with_cache(*wide[:3], *step.metadata("cuda"), *wide[3:], scale, sinks, window, cap)


LONG = Step([700, 0, 300, 1, 1, 1], [500, 3, 0, 1999, 800, 31], [0, 1, 2, 3, 1, -1], decode=3, padding=5)


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "size", "value_size", "options"), [
    (torch.bfloat16, 16, 2, 128, 128, {}), (torch.bfloat16, 16, 2, 128, 128, {"window": 300, "sinks": True}),
    (torch.float16, 14, 2, 64, 64, {"sinks": True}), (torch.float32, 4, 2, 128, 128, {}),
    (torch.bfloat16, 4, 4, 256, 256, {}), (torch.float16, 5, 1, 80, 48, {"window": 70}),
    (torch.bfloat16, 6, 2, 192, 128, {}), (torch.float16, 3, 3, 33, 33, {}),
], ids=str)  # fmt: skip
def test_long_mixed_steps_at_any_head_size(dtype, heads, kv_heads, size, value_size, options):
    tensors = build(LONG, heads, kv_heads, size, value_size, dtype)
    sinks = torch.linspace(-2, 4, heads, device="cuda") if "sinks" in options else None
    expected = want(LONG, *tensors, sinks=sinks, window=options.get("window"))
    out = OP(*tensors[:3], *LONG.metadata("cuda"), *tensors[3:], None, sinks, options.get("window"))
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "size", "options"), [
    (torch.bfloat16, 4, 2, 256, {}), (torch.bfloat16, 4, 2, 256, {"window": 300}),
    (torch.bfloat16, 8, 2, 128, {"sinks": True}), (torch.float16, 4, 2, 256, {}), (torch.float32, 4, 2, 128, {}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("scale", [0.1, 4.0])  # the cap hardly bends scores; it binds most of them
def test_capped_scores_of_long_mixed_steps(dtype, heads, kv_heads, size, options, scale):
    tensors = build(LONG, heads, kv_heads, size, size, dtype)
    sinks = torch.linspace(-2, 4, heads, device="cuda") if "sinks" in options else None
    capped = scale, 50.0 if scale < 1 else 8.0
    expected = want(LONG, *tensors, sinks, options.get("window"), *capped)
    out = attend_to_cache(
        *tensors[:3], *LONG.metadata("cuda")[:-1], *tensors[3:], capped[0], sinks, options.get("window"), capped[1]
    )
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_scores_at_their_cap_stay_finite():
    tensors = [x.abs() for x in build(LONG, 4, 2, 256, 256, torch.bfloat16)]
    expected = want(LONG, *tensors, None, None, 1e3, 60.0)
    out = attend_to_cache(*tensors[:3], *LONG.metadata("cuda")[:-1], *tensors[3:], 1e3, None, None, 60.0)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


def test_nothing_synchronises_and_a_decode_graph_follows_its_inputs():
    step = Step([1] * 3, [700, 31, 0], [2, 0, 1], decode=3)
    tensors = build(step, 16, 2, 128, 128, torch.bfloat16)
    metadata = step.metadata("cuda")
    OP(*tensors[:3], *metadata, *(x.clone() for x in tensors[3:]), None)
    mixed_metadata = LONG.metadata("cuda")
    mixed = build(LONG, 16, 2, 128, 128, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OP(*mixed[:3], *mixed_metadata, *mixed[3:], None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(*tensors[:3], *metadata, *tensors[3:], None)
    for past in ([700, 31, 0], [5, 2047, 1], [64, 63, 65]):
        metadata[2].copy_(torch.tensor(past))
        now = Step([1] * 3, past, [2, 0, 1], decode=3)
        tensors[0].normal_()
        expected = want(now, *tensors)
        graph.replay()
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


def test_caches_beyond_two_to_the_31_elements(much_memory):
    far = Step([200, 1, 1], [0, 65000, 700], [33, 32, 34], decode=2)
    near = Step([200, 1, 1], [0, 65000, 700], [1, 0, 2], decode=2)
    q, k, v, small_k, small_v = build(near, 8, 8, 128, 128, torch.bfloat16, slots=3, max_seq=65536)
    caches = [torch.zeros(35, 65536, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for cache, small in zip(caches, (small_k, small_v), strict=True):
        assert cache.numel() > 2**31
        cache[32:] = small
    expected = OP(q, k, v, *near.metadata("cuda"), small_k, small_v, None)
    out = OP(q, k, v, *far.metadata("cuda"), *caches, None)
    assert torch.equal(out, expected)
    assert all(torch.equal(cache[32:], small) for cache, small in zip(caches, (small_k, small_v), strict=True))
    assert not any(cache[:32].any() for cache in caches)
