"""Samples of the MLA operators; values of the FlashInfer operator are proven in its own test file."""

import oracles_attention as oracle
import torch
from operator_samples import Sample
from oracles_attention import Step
from paging import PAGE_SIZE, Paged
from samples_attention import metadata, metadata_args

HEADS, NOPE, ROPE, VALUE, RANK = 3, 8, 4, 6, 10
STEP = Step([4, 1, 1], [2, 7, 0], [0, 1, 2], decode=2, padding=1)


def tensors(batch, tokens, device, dtype=torch.float32, sizes=(HEADS, NOPE, ROPE, VALUE, RANK)):
    """q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight."""
    heads, nope, rope, value, rank = sizes

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    return (random(batch, tokens, heads, nope), random(batch, tokens, heads, rope), random(batch, tokens, rank),
            random(batch, tokens, 1, rope), random(heads * (nope + value), rank))  # fmt: skip


def mla(q_nope, q_pe, latent, kpe, weight, causal, scale, layout):
    if layout == "bnsd":
        q_nope, q_pe, kpe = (x.transpose(1, 2) for x in (q_nope, q_pe, kpe))
    rows = []
    for b in range(len(latent)):
        keys, values = oracle.expand_latent(latent[b].cpu(), kpe[b, :, 0].cpu(), weight.cpu(), HEADS, NOPE)
        query = torch.cat((q_nope[b], q_pe[b]), dim=-1).cpu()
        parts = [x.transpose(0, 1)[None] for x in (query, keys, values)]
        rows.append(oracle.attention(*parts, causal=causal, scale=scale)[0])
    out = torch.stack(rows)
    return (out if layout == "bnsd" else out.transpose(1, 2),)


def mla_args(layout):
    def build(device):
        q_nope, q_pe, latent, kpe, weight = tensors(2, 5, device)
        if layout == "bnsd":
            q_nope, q_pe, kpe = (x.transpose(1, 2) for x in (q_nope, q_pe, kpe))
        return q_nope, q_pe, latent, kpe, weight, True, 0.2, layout

    return build


def cached_args(device):
    cache = torch.randn(4, 12, RANK + ROPE, device=device)
    return *tensors(1, STEP.tokens, device), *STEP.metadata(device), cache, None, RANK


def cached(q_nope, q_pe, latent, kpe, weight, *rest):
    flat = [x.cpu() for x in (q_nope[0], q_pe[0], latent[0], kpe[0, :, 0], weight, rest[5])]
    out, cache = oracle.cached_mla(STEP, *flat)
    return out[None], cache


def flashinfer_args(device):
    dtype = torch.bfloat16
    given = tensors(1, STEP.tokens, device, dtype, (16, 128, 64, 128, 512))
    paged = Paged.of(STEP, device)
    tokens = torch.ops.auto_deploy.flashinfer_mla_prepare_metadata(*paged.metadata_inputs(STEP, device))
    caches = [torch.randn(8, PAGE_SIZE, n, device=device, dtype=dtype) for n in (512, 64)]
    return *given, *paged.arguments(), *tokens, *caches, None, 512


SAMPLES = [
    Sample(op="torch_mla", build=mla_args("bsnd"), oracle=mla, traced=True),
    Sample(op="torch_mla", build=mla_args("bnsd"), oracle=mla, note="bnsd"),
    Sample(op="torch_cached_mla_with_cache", build=cached_args, oracle=cached, traced=True),
    Sample(op="flashinfer_mla_prepare_metadata", build=metadata_args, oracle=metadata, traced=True),
    Sample(op="flashinfer_mla_with_cache", build=flashinfer_args, traced=True),
]
