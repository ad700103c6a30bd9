"""Products of heads by their parts of the weight: ours for few tokens, PyTorch's for more."""

import pytest
import torch

from shardwise.ops.mla import absorb
from shardwise.ops.mla.absorb import Factor, Rows, head_product
from shardwise.ops.mla.checks import LatentHeads, split_weight
from shardwise.ops.registry import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOPE, VALUE, RANK, BEFORE = 128, 128, 512, 2
runs = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.skipif(not TRITON.state[0], reason=TRITON.state[1])


def build(heads, tokens, dtype, nope=NOPE, value=VALUE):
    """x [BEFORE + T, N, Dn of Dn + 64], the weight, and its parts."""
    torch.manual_seed(3)
    x = torch.randn(BEFORE + tokens, heads, nope + 64, device=DEVICE).to(dtype)
    weight = (torch.randn(heads * (nope + value), RANK, device=DEVICE) / RANK**0.5).to(dtype)
    return x, weight, split_weight(weight, LatentHeads(heads, nope, 64, value, RANK))


def to_latents(x, weight, heads, tokens, nope=NOPE, value=VALUE):
    out = torch.full((tokens, heads, RANK), float("nan"), dtype=x.dtype, device=DEVICE)
    rows, result = Rows(heads * (nope + 64), nope + 64, BEFORE), Rows(heads * RANK, RANK)
    factor = Factor(0, (nope + value) * RANK, RANK, 1)
    head_product(x, tokens, heads, nope, RANK, rows, factor, result)(x, weight, out)
    return out


def to_values(latents, weight, heads, tokens, nope=NOPE, value=VALUE):
    """[T, N, Dv] of a longer result, and the rest of it."""
    out = torch.full((BEFORE + tokens + 1, heads, value), 7.0, dtype=latents.dtype, device=DEVICE)
    rows, result = Rows(heads * RANK, RANK), Rows(heads * value, value, BEFORE)
    factor = Factor(nope * RANK, (nope + value) * RANK, 1, RANK)
    head_product(latents, tokens, heads, RANK, value, rows, factor, result)(latents, weight, out)
    return out[BEFORE : BEFORE + tokens], torch.cat((out[:BEFORE], out[BEFORE + tokens :]))


def error(got, want):
    """Root mean square."""
    return (got.double() - want).square().mean().sqrt().item()


@runs
@pytest.mark.parametrize(
    ("tokens", "heads", "dtype"),
    [(1, 3, torch.bfloat16), (16, 3, torch.float16), (17, 3, torch.bfloat16), (64, 3, torch.float16),
     (65, 3, torch.bfloat16), (5, 49, torch.float16)],
)  # fmt: skip
def test_both_products_are_as_exact_as_pytorchs(tokens, heads, dtype):
    x, weight, (keys, values) = build(heads, tokens, dtype)
    rows = x[BEFORE:, :, :NOPE].transpose(0, 1)
    latents = to_latents(x, weight, heads, tokens)
    want, batched = torch.bmm(rows.double(), keys.double()), torch.bmm(rows, keys)
    # Triton's interpreter cuts float32 off to bfloat16, which doubles the error of a rounding.
    bound = 2.1 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1.01
    assert error(latents.transpose(0, 1), want) <= bound * error(batched, want)
    out, rest = to_values(latents, weight, heads, tokens)
    assert (rest == 7).all()
    rows, values = latents.transpose(0, 1), values.transpose(1, 2)
    want, batched = torch.bmm(rows.double(), values.double()), torch.bmm(rows, values)
    assert error(out.transpose(0, 1), want) <= bound * error(batched, want)


@runs
def test_sizes_that_no_tile_fits_and_many_tokens_take_pytorchs_product(monkeypatch):
    monkeypatch.setattr(absorb, "_KERNEL", None)
    for tokens, nope, value in ((3, 100, 72), (absorb.MOST_TOKENS + 1, NOPE, VALUE)):
        x, weight, (keys, values) = build(2, tokens, torch.float16, nope, value)
        latents = to_latents(x, weight, 2, tokens, nope, value)
        want = torch.einsum("tnk,nkr->tnr", x[BEFORE:, :, :nope].float(), keys.float())
        torch.testing.assert_close(latents.float(), want, atol=2e-3, rtol=2e-3)
        out, _ = to_values(latents, weight, 2, tokens, nope, value)
        want = torch.einsum("tnr,nvr->tnv", latents.float(), values.float())
        torch.testing.assert_close(out.float(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_products_see_what_the_kernel_before_them_wrote():
    heads, tokens = 128, 4
    x, weight, _ = build(heads, tokens, torch.bfloat16)
    source, wanted = x.clone(), to_latents(x, weight, heads, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.zero_()
        x.copy_(source)
        out, _ = to_values(to_latents(x, weight, heads, tokens), weight, heads, tokens)
    for _ in range(20):
        graph.replay()
    assert torch.equal(out, to_values(wanted, weight, heads, tokens)[0])
