"""Samples of the utilities."""

import torch
from operator_samples import Sample


def gather_scatter_args(count, dtype=torch.int64, index=torch.int32, spare=0):
    def build(device):
        source = torch.randint(0, 1000, (3 * count,), device=device).to(dtype)
        gather = torch.randint(0, 3 * count, (count,), device=device, dtype=index)
        scatter = torch.randperm(2 * count, device=device)[: count + spare].to(index)
        return source, gather, scatter, torch.zeros(2, count, device=device, dtype=dtype)

    return build


def gather_scatter(source, gather, scatter, out):
    flat = out.flatten().clone()
    flat[scatter[: len(gather)].long()] = source.flatten()[gather.long()]
    return (flat.view_as(out),)


def logits_args(*shape, rows, required=1):
    def build(device):
        tokens = max(shape[:2])
        indices = torch.randint(0, tokens, (tokens,), device=device)
        return torch.randn(*shape, device=device), indices, torch.tensor([rows, required], dtype=torch.int32)

    return build


def logits(hidden, indices, info):
    rows, required = info.tolist()
    if not required:
        return (hidden,)
    flat = hidden.flatten(0, 1)[indices[:rows]]
    return (flat[:, None] if hidden.shape[1] == 1 else flat[None],)


def out_of_range(device):
    index = torch.tensor([-1, 5, 2, 1], device=device)
    return (
        torch.arange(3, device=device),
        index,
        torch.tensor([0, 1, 2, 9], device=device),
        torch.zeros(3, device=device),
    )


def skipping(source, gather, scatter, out):
    return (torch.tensor([0.0, 0.0, 2.0]),)


def token_args(*shape, info):
    def build(device):
        tokens = max(shape[:2])
        indices = torch.randint(0, tokens, (tokens,), device=device)
        return torch.randn(*shape, device=device), indices, torch.tensor(info, dtype=torch.int32)

    return build


def tokens_oracle(rows):
    """`rows` None: all of them, as they are."""
    return lambda hidden, indices, _: logits(hidden, indices, torch.tensor([rows or 0, rows is not None]))


SAMPLES = [
    *(
        Sample(op=f"{backend}_utils_fused_gather_scatter", build=build, oracle=oracle, traced=not note, note=note)
        for backend in ("torch", "triton")
        for build, oracle, note in (
            (gather_scatter_args(50), gather_scatter, ""),
            (gather_scatter_args(1500, torch.bfloat16, torch.int64), gather_scatter, "two programs"),
            (gather_scatter_args(7, spare=3), gather_scatter, "spare places"),
            (out_of_range, skipping, "out of range"),
        )
    ),
    Sample(op="gather_tokens", build=token_args(1, 9, 4, info=[2, 7, 2]), oracle=tokens_oracle(4), bound=True),
    Sample(
        op="gather_tokens",
        build=token_args(1, 12, 4, info=[1, 4, 2, 5, 3, 3]),
        oracle=tokens_oracle(9),
        bound=True,
        note="extend",
    ),
    Sample(
        op="gather_tokens",
        build=token_args(5, 1, 4, info=[0, 0, 0, 0, 5, 5, 99, -1]),
        oracle=tokens_oracle(None),
        traced=True,
        note="decode",
    ),
    Sample(
        op="gather_tokens",
        build=token_args(5, 1, 4, info=[0, 0, 3]),
        oracle=tokens_oracle(3),
        bound=True,
        note="padded",
    ),
    Sample(op="gather_logits_before_lm_head", build=logits_args(1, 9, 4, rows=3), oracle=logits, bound=True),
    Sample(
        op="gather_logits_before_lm_head", build=logits_args(5, 1, 4, rows=2), oracle=logits, bound=True, note="rows"
    ),
    Sample(
        op="gather_logits_before_lm_head",
        build=logits_args(1, 9, 4, rows=0, required=0),
        oracle=logits,
        traced=True,
        note="none",
    ),
]
