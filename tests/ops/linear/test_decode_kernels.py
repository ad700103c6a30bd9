"""The fused decode kernels against plain float64 maths."""

import pytest
import torch
import torch.nn.functional as F

from shardwise.ops.attention.decode import DecodeWorkspace, fused_decode_attention, gate_output
from shardwise.ops.linear.decode import Tile, gated_activation, skinny_linear
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)


def randn(*shape, dtype=torch.float16, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def close(actual, expected, tolerance=4e-3):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("n, k", [(40, 256), (37, 200)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["plain", "bias", "residual", "gated"])
@pytest.mark.parametrize(
    "tile", [Tile(4, 1), Tile(4, 1, early=True), Tile(2, 1, stages=3), Tile(2, 1, whole=True)], ids=str
)
def test_skinny_linear(tokens, n, k, norm, form, tile):
    torch.manual_seed(0)
    x, weight = randn(tokens, k), randn(2 * n if form == "gated" else n, k, scale=k**-0.5)
    norm_weight = randn(k) if norm else None
    bias = randn(n) if form == "bias" else None
    residual = randn(tokens, n) if form == "residual" else None
    got = skinny_linear(
        x, weight, norm_weight=norm_weight, eps=1e-5, bias=bias, residual=residual, gated=form == "gated", tile=tile
    )
    wide = rms_norm(x.double(), norm_weight.double(), 1e-5) if norm else x.double()
    expected = wide @ weight.double().T
    if form == "gated":
        expected = F.silu(expected[:, :n]) * expected[:, n:]
    close(got, expected + sum(term.double() for term in (bias, residual) if term is not None))


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_with_the_product_and_by_themselves(gelu):
    torch.manual_seed(0)
    x, weight = randn(2, 256), randn(2 * 300, 256, scale=0.2)
    gate, up = (both := x.double() @ weight.double().T).split(300, 1)
    expected = up * (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate))
    close(skinny_linear(x, weight, gated=True, gelu=gelu, tile=Tile(4, 1)), expected)
    close(gated_activation(both.half(), gelu=gelu), expected)


def test_more_tokens_than_a_kernel_takes_are_refused():
    with pytest.raises(ValueError, match="5 tokens; legal: 1 to 4"):
        skinny_linear(randn(5, 128), randn(4, 128))


def test_skinny_linear_keeps_the_normed_input():
    torch.manual_seed(0)
    x, weight, norm = randn(2, 600), randn(16, 600, scale=0.05), randn(600)
    normed = torch.full((2, 600), torch.nan, device=DEVICE)
    got = skinny_linear(x, weight, norm_weight=norm, normed=normed, out_dtype=torch.float32, tile=Tile(4, 1))
    wide = rms_norm(x.double(), norm.double(), 1e-6)
    assert got.dtype == torch.float32
    close(normed, wide, 1e-6)
    close(got, wide @ weight.double().T, 1e-6)


def rotate(x, rope, rotated):
    """The first `rotated` columns of each head, by the first angles of `rope`."""
    half, behind = rotated // 2, x[..., rotated:]
    cos, sin = rope[..., :half], rope[..., x.shape[-1] // 2 :][..., :half]
    one, two = x[..., :half], x[..., half:rotated]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, behind], -1)


def prepared(x, weight, rope, rotated, norm_last):
    """Heads normed, where there is a weight, and rotated, or the other way round."""
    normed = lambda x: x if weight is None else rms_norm(x, weight, 1e-6)  # noqa: E731
    return normed(rotate(x, rope, rotated)) if norm_last else rotate(normed(x), rope, rotated)


def oracle(qkv, k_cache, v_cache, table, position, rope, heads, q_norm, k_norm, sinks, window, softcap, row, **order):
    """Output [N, D] of one sequence, and its new key and value [Nkv, D]."""
    page_size, kv_heads, dim = k_cache.shape[1:]
    parts = qkv.view(heads + 2 * kv_heads, dim)
    q, k, v = parts[:heads], parts[heads : heads + kv_heads], parts[heads + kv_heads :]
    q, k = prepared(q, q_norm, rope[position], **order), prepared(k, k_norm, rope[position], **order)
    pages = table[row, : position // page_size + 1].long()
    keys = torch.cat([k_cache[pages].reshape(-1, kv_heads, dim)[:position], k[None]])
    values = torch.cat([v_cache[pages].reshape(-1, kv_heads, dim)[:position], v[None]])
    if window:
        keys, values = keys[-window:], values[-window:]
    scores = torch.einsum("gqd,sgd->gqs", q.view(kv_heads, -1, dim), keys) * dim**-0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(kv_heads, -1, 1)], -1)
    p = scores.softmax(-1)[..., : keys.shape[0]]
    return torch.einsum("gqs,sgd->gqd", p, values).reshape(heads, dim), k, v


def pages_of(layout, pages, page_size, kv_heads, dim):
    """Key and value pages [pages, page_size, Nkv, D] in one of the memory orders that callers keep."""
    if layout == "heads first":
        both = randn(pages, 2, kv_heads, page_size, dim)
        return both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    if layout == "rows joined":
        both = randn(pages, page_size, 2, kv_heads, dim)
        return both[:, :, 0], both[:, :, 1]
    return randn(pages, page_size, kv_heads, dim), randn(pages, page_size, kv_heads, dim)


@pytest.fixture(params=["registers", "matrix unit"])
def kernel(request, monkeypatch):
    """Which of the two kernels serves, whatever the number of sequences."""
    monkeypatch.setattr("shardwise.ops.attention.decode.DIRECT_PAIRS", 1000 if request.param == "registers" else 0)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("heads, kv_heads, layout", [(6, 2, "plain"), (6, 2, "heads first"), (4, 4, "rows joined")])
@pytest.mark.parametrize("options", ["plain", "qk_norm", "sinks", "window", "no rotation"])
def test_fused_decode_attention(kernel, splits, heads, kv_heads, layout, options):
    check_decode_attention(32, 16, [0, 37, 16, -1, 75], splits, heads, kv_heads, layout, options)


@pytest.mark.parametrize("options", ["part", "capped", "qk_norm, normed last"])
def test_fused_decode_attention_of_fewer_models(kernel, options):
    check_decode_attention(32, 16, [37, 0, -1], 4, 6, 2, "plain", options)


@pytest.mark.parametrize(
    "dim, group, options",
    [
        (64, 4, "sinks"),
        (128, 4, "qk_norm"),
        (128, 2, "plain"),
        (128, 3, "part"),
        (128, 2, "part, qk_norm"),
        (64, 2, "part, qk_norm, normed last"),
        (256, 1, "window"),
        (96, 1, "plain"),
        (80, 3, "part, qk_norm, capped"),
        (256, 2, "capped, window"),
    ],
)
def test_fused_decode_attention_of_real_heads(kernel, dim, group, options):
    check_decode_attention(dim, 64, [63, 200], 3, group, 1, "plain", options)


def check_decode_attention(dim, page_size, positions, splits, heads, kv_heads, layout, options):
    torch.manual_seed(1)
    options = options.split(", ")
    batch, max_pages = len(positions), max(positions) // page_size + 1
    k_cache, v_cache = pages_of(layout, batch * max_pages, page_size, kv_heads, dim)
    table = torch.randperm(batch * max_pages).view(batch, max_pages).int().to(DEVICE)
    angles = torch.rand(max(positions) + 1, dim // 2, dtype=torch.float64) * (0 if "no rotation" in options else 6)
    rotated = dim * 3 // 4 if "part" in options else dim
    angles[:, rotated // 2 :] = 0
    rope = torch.cat([angles.cos(), angles.sin()], -1).to(DEVICE)
    qkv = randn(batch, (2 * heads + 2 * kv_heads) * dim)[:, : (heads + 2 * kv_heads) * dim]  # rows with gates behind
    q_norm, k_norm = (randn(dim), randn(dim)) if "qk_norm" in options else (None, None)
    sinks = randn(heads) if "sinks" in options else None
    window = 9 if "window" in options else None
    softcap, norm_last = 1.5 if "capped" in options else None, "normed last" in options
    before_k, before_v = k_cache.double(), v_cache.double()
    got = fused_decode_attention(
        qkv, k_cache, v_cache, table, torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        None if "no rotation" in options else rope.float(),
        DecodeWorkspace.create(batch, heads, kv_heads, dim, splits, DEVICE),
        heads=heads, q_norm=q_norm, k_norm=k_norm, sinks=sinks, window=window,
        softcap=softcap, rotated=rotated if "part" in options else None, norm_last=norm_last,
    )  # fmt: skip
    wide = [None if t is None else t.double() for t in (q_norm, k_norm, sinks)]
    for row, position in enumerate(positions):
        if position < 0:
            assert not got[row].any()
            continue
        expected, k, v = oracle(
            qkv[row].double(), before_k, before_v, table, position, rope, heads, *wide, window, softcap, row,
            rotated=rotated, norm_last=norm_last,
        )  # fmt: skip
        close(got[row].view(heads, dim), expected)
        page = table[row, position // page_size].item()
        close(k_cache[page, position % page_size], k)
        close(v_cache[page, position % page_size], v)
        before_k[page, position % page_size] = k_cache[page, position % page_size].double()
        before_v[page, position % page_size] = v_cache[page, position % page_size].double()
    assert torch.equal(k_cache.double(), before_k) and torch.equal(v_cache.double(), before_v)


def test_an_output_is_gated_in_place_by_rows_of_a_wider_tensor():
    attended, rows = randn(3, 1500), randn(3, 4000)
    expected = attended.double() * rows[:, 2500:].double().sigmoid()
    gate_output(attended, rows[:, 2500:])
    close(attended, expected, 1e-3)
