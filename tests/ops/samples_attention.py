"""Samples of the attention operators; values of the FlashInfer operators are proven in their own test files."""

import oracles_attention as oracle
import torch
from operator_samples import Sample
from oracles_attention import Step
from paging import PAGE_SIZE, Paged

import shardwise.ops  # noqa: F401  registers the operators

HALF = torch.float16  # bfloat16 products are garbage in Triton's interpreter
STEP = Step([4, 1, 1], [2, 7, 0], [0, 1, 2], decode=2, padding=1)
DECODE = Step([1, 1, 1], [6, 0, 3], [0, -1, 1], decode=3)


def qkv(dtype=torch.float32, layout="bnsd", **options):
    def build(device):
        q, k, v = (
            torch.randn(2, n, s, d, device=device, dtype=dtype) for n, s, d in ((4, 5, 16), (2, 7, 16), (2, 7, 8))
        )
        if layout == "bsnd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.randn(2, 1, 5, 7, device=device) > -0.5 if "mask" in options else None
        sinks = torch.randn(4, device=device) if "sinks" in options else None
        return (q, k, v, mask, 0.0, options.get("causal", False), options.get("scale"), sinks, options.get("window"),
                options.get("cap"), layout)  # fmt: skip

    return build


def attention(q, k, v, mask, _, causal, scale, sinks, window, cap, layout):
    if layout == "bsnd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask.cpu().expand(*q.shape[:3], k.shape[2])
    sinks = None if sinks is None else sinks.cpu()
    out = oracle.attention(*(x.cpu() for x in (q, k, v)), mask=mask, causal=causal, scale=scale, sinks=sinks,
                           window=window, cap=cap)  # fmt: skip
    return (out.transpose(1, 2) if layout == "bsnd" else out,)


def sdpa_args(device):
    return tuple(torch.randn(2, 4, 5, 8, device=device) for _ in range(3))


def sdpa(q, k, v):
    return (oracle.attention(*(x.cpu() for x in (q, k, v))),)


def cached_args(step, dtype=torch.float32, size=16, value_size=16, flat=False, tail=()):
    def build(device):
        q, k = (torch.randn(1, step.tokens, n, size, device=device, dtype=dtype) for n in (4, 2))
        v = torch.randn(1, step.tokens, 2, value_size, device=device, dtype=dtype)
        caches = [torch.randn(4, 12, 2, n, device=device, dtype=dtype) for n in (size, value_size)]
        tensors = [x.flatten(2) for x in (q, k, v)] if flat else (q, k, v)
        return *tensors, *step.metadata(device), *caches, *tail

    return build


def cached(step, size=16, value_size=16):
    def expected(q, k, v, *rest):
        k_cache, v_cache, scale, sinks, window, *cap = [*rest[5:], *(None,) * 4][:6]
        q, k, v = (x[0].unflatten(-1, (-1, n)) if x.dim() == 3 else x[0]
                   for x, n in ((q, size), (k, size), (v, value_size)))  # fmt: skip
        out, *caches = oracle.cached_attention(
            step, *(x.cpu() for x in (q, k, v, k_cache, v_cache)), scale=scale, window=window, cap=cap[0],
            sinks=None if sinks is None else sinks.cpu(),
        )  # fmt: skip
        return out[None], *caches

    return expected


def flat_cached(step):
    def expected(*args):
        out, *caches = cached(step)(*args)
        return (out.flatten(2), *caches)

    return expected


def metadata_args(device):
    return Paged.of(STEP).metadata_inputs(STEP, device)


def metadata(*_):
    tokens = [(i, past + t) for i, (n, past) in enumerate(zip(STEP.lengths, STEP.past, strict=True)) for t in range(n)]
    both = torch.tensor([*tokens, (-1, -1)])
    return both[:, 0], both[:, 1]


def flashinfer_args(device):
    paged = Paged.of(STEP, device)
    q, k, v = (torch.randn(1, STEP.tokens, n, 64, device=device, dtype=HALF) for n in (4, 2, 2))
    tokens = torch.ops.auto_deploy.flashinfer_attention_prepare_metadata(*paged.metadata_inputs(STEP, device))
    cache = torch.randn(8, 2, 2, PAGE_SIZE, 64, device=device, dtype=HALF)
    return q, k, v, *paged.arguments(), *tokens, cache, None, 1.0, 1.0


def plugin_args(device):
    q, k, v = (torch.randn(2, 3, n * 8, device=device) for n in (4, 2, 2))
    past = torch.randn(2, 2, 2, 5, 8, device=device)
    rope = torch.randn(2, 16, 8, device=device)
    lengths = (
        torch.tensor([8, 5], dtype=torch.int32, device=device),
        torch.tensor([5, 3], dtype=torch.int32, device=device),
    )
    return q, k, v, past, lengths[0], rope, lengths[1], 0, 8, 2, 4


def gather_args(device):
    return torch.randn(2, 5, 3, device=device), torch.tensor([[0, 4, -1], [2, 2, 1]], device=device), 1


def gather(data, indices, _):
    return (torch.stack([data[b, indices[b]] for b in range(len(data))]),)


SAMPLES = [
    Sample(op="torch_attention", build=qkv(causal=True), oracle=attention, traced=True),
    Sample(op="torch_attention", build=qkv(HALF, "bsnd", window=3, cap=2.0), oracle=attention, atol=2e-3, note="half"),
    Sample(op="torch_attention", build=qkv(mask=True, sinks=True, scale=0.3), oracle=attention, note="mask and sinks"),
    Sample(op="torch_attention_sdpa", build=sdpa_args, oracle=sdpa, traced=True),
    Sample(
        op="torch_attention_sdpa",
        build=lambda device: tuple(torch.randn(0, 4, 5, 8, device=device, dtype=HALF) for _ in range(3)),
        oracle=sdpa,
        note="empty",
    ),
    Sample(
        op="torch_attention_repeat_kv",
        build=lambda device: (torch.randn(2, 3, 5, 4, device=device), 2),
        oracle=lambda hidden, n: (hidden.repeat_interleave(n, dim=1),),
        traced=True,
    ),
    Sample(
        op="torch_cached_attention_with_cache", build=cached_args(STEP, tail=(None,)), oracle=cached(STEP), traced=True
    ),
    Sample(
        op="torch_cached_attention_with_cache",
        build=cached_args(DECODE, flat=True, tail=(0.2, None, 3, 1.5)),
        oracle=flat_cached(DECODE),
        note="flat",
    ),
    Sample(
        op="triton_attention_flattened_mha_with_cache",
        build=cached_args(STEP, tail=(None,)),
        oracle=cached(STEP),
        traced=True,
    ),
    Sample(
        op="triton_attention_flattened_mha_with_cache",
        build=cached_args(DECODE, HALF, flat=True, tail=(0.2, None, 3)),
        oracle=flat_cached(DECODE),
        atol=4e-3,
        note="flat half",
    ),
    Sample(op="flashinfer_attention_prepare_metadata", build=metadata_args, oracle=metadata, traced=True),
    Sample(op="flashinfer_attention_mha_with_cache", build=flashinfer_args, traced=True),
    Sample(op="torch_onnx_attention_plugin", build=plugin_args, traced=True),
    Sample(op="torch_onnx_gather_nd", build=gather_args, oracle=gather, traced=True),
]
