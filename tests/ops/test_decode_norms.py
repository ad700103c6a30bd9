"""Norms of the fused decode step against plain float64 maths."""

import pytest
import torch
import torch.nn.functional as F

from shardwise.ops.normalization.decode import AllHeads, RowNorm, join
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def norm_of(kind, size):
    if kind == "none":
        return None
    return RowNorm(randn(size), 1e-5, randn(size) if "bias" in kind else None, "layer" in kind)


def normed(x, norm):
    if norm is None:
        return x
    weight, bias = norm.weight.double(), None if norm.bias is None else norm.bias.double()
    if norm.centred:
        return F.layer_norm(x, weight.shape, weight, bias, norm.eps)
    return F.rms_norm(x, weight.shape, weight, norm.eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("post, multiplier", [("none", 1.0), ("rms", 1.0), ("none", 0.22), ("layer, bias", 1.0)])
@pytest.mark.parametrize("kind", ["none", "rms", "layer", "layer, bias"])
def test_a_partial_result_joins_the_residual(dtype, post, multiplier, kind):
    torch.manual_seed(0)
    size = 200
    partial, residual = randn(3, size, dtype=dtype) + 5, randn(3, size, dtype=dtype)
    post, norm = norm_of(post, size), norm_of(kind, size)
    total = residual.double() + multiplier * normed(partial.double(), post)
    got = join(partial, residual, post=post, multiplier=multiplier, norm=norm)
    tolerance = dict(rtol=0, atol=1e-5) if dtype == torch.float32 else dict(rtol=4e-3, atol=2e-2)
    torch.testing.assert_close(residual.double(), total, **tolerance)
    torch.testing.assert_close(got.double(), normed(total, norm), **tolerance)
    assert got is (residual if norm is None else partial)


def test_tensors_of_two_shapes_do_not_join():
    with pytest.raises(ValueError, match="join: contiguous tensors of one shape"):
        join(randn(2, 8), randn(2, 9))


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_heads_are_normed_at_once_over_ranks_that_share_a_key_head(ranks):
    torch.manual_seed(0)
    size, queries, keys, eps = 32, 3, 2, 1e-5
    rows = [randn(2, (queries + 2 * keys) * size) for _ in range(ranks)]
    weight = randn((queries + keys) * size)
    # Both ranks hold the same last key head, so each counts half of it.
    if ranks == 2:
        last = slice((queries + 1) * size, (queries + 2) * size)
        rows[1][:, last] = rows[0][:, last]
    key_heads = ranks * keys - (ranks - 1)
    share = torch.full((queries + keys,), 1 / (ranks * queries * size), device=DEVICE)
    share[queries:] = 1 / (key_heads * size)
    share[queries + 1] /= ranks
    before = [row.double() for row in rows]
    norms = AllHeads(weight=weight, share=share, heads=(queries, keys), eps=eps)
    if ranks == 1:
        norms(rows[0])
    else:
        means = sum(norms.means(row) for row in rows)
        for row in rows:
            norms.apply(row, means)
    q_end, k_end = queries * size, (queries + keys) * size
    all_q = torch.cat([row[:, :q_end] for row in before], 1)
    all_k = torch.cat([before[0][:, q_end:k_end], *(row[:, q_end : k_end - size] for row in before[1:])], 1)
    for row, old in zip(rows, before, strict=True):
        for part, whole in ((slice(0, q_end), all_q), (slice(q_end, k_end), all_k)):
            scale = torch.rsqrt(whole.square().mean(1, keepdim=True) + eps)
            expected = old[:, part] * scale * weight[part].double()
            torch.testing.assert_close(row[:, part].double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(row[:, k_end:].double(), old[:, k_end:])
