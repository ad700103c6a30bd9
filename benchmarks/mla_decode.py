"""Decode of latent attention on one GPU beside FlashInfer's, under CUDA graphs, in the same run.

    python benchmarks/mla_decode.py [--heads 16 128] [--json FILE]

`step` is all that our kernels do for one new token a sequence: both products of the absorbed weight, norm, rotation and
append of the key, attention; `attend` is attention alone. `fi attend` is FlashInfer's MLA kernel, `fi step` with its
append and torch.bmm for the products, norm and rotation left out. Times are medians of graph replays, the graphs of a
row replayed in turn; a graph holds several layers with caches of their own, more bytes than the L2 cache where 16
suffice for that. Times are for one layer. `read` is what attention must read of the cache, at a plain copy's rate.
"""

import argparse
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import alternating_microseconds
from shardwise.ops.mla import decode
from shardwise.parallel.traffic import copy_bandwidth

NOPE, RANK, ROPE, VALUE, PAGE = 128, 512, 64, 128, 64
WIDTH = RANK + ROPE
SCALE = (NOPE + ROPE) ** -0.5
FOOTPRINT = 256 << 20  # bytes that the layers of one graph read
SHAPES = {  # (sequences, tokens of each)
    16: ((1, 512), (1, 8192), (1, 32768), (16, 2048), (64, 512), (64, 4096)),
    32: ((64, 4096),),
    64: ((64, 4096),),
    128: ((1, 4096), (32, 4096), (128, 1024)),
}
DTYPE = torch.bfloat16


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


@dataclass(frozen=True)
class Inputs:
    """One step's, the same for all layers, which have caches and weights of their own."""

    heads: int
    batch: int
    context: int

    def __post_init__(self) -> None:
        pages = -(-self.context // PAGE)
        count = max(1, min(16, FOOTPRINT // (2 * self.batch * pages * PAGE * WIDTH)))
        values = dict(
            q=random(self.batch, self.heads * (NOPE + ROPE)),
            key=random(self.batch, WIDTH),
            pools=[random(self.batch * pages, PAGE, WIDTH) for _ in range(count)],
            weights=[(random(self.heads, NOPE, RANK) / 20, random(self.heads, RANK, VALUE) / 20) for _ in range(count)],
            table=torch.randperm(self.batch * pages, device="cuda").int().view(self.batch, pages),
            slots=torch.arange(self.batch, device="cuda", dtype=torch.int32),
            positions=torch.full((self.batch,), self.context - 1, device="cuda", dtype=torch.int32),
            rope=torch.randn(pages * PAGE, ROPE, device="cuda"),
            norm=random(RANK),
            workspace=decode.LatentWorkspace.create(self.batch, self.heads, RANK, torch.device("cuda")),
        )
        for name, value in values.items():
            object.__setattr__(self, name, value)


def ours(x: Inputs) -> dict[str, list]:
    query = random(x.batch, x.heads, WIDTH)
    plan = decode.plan_for(x.heads, x.pools[0], RANK)

    def step(pool, weights):
        return lambda: decode.latent_decode_attention(
            x.q, x.key, *weights, pool, x.table, x.slots, x.positions, x.workspace,
            scale=SCALE, norm=x.norm, rope=x.rope, pdl=True,
        )  # fmt: skip

    def attend(pool):
        return lambda: decode.attend(
            query, pool, x.table, x.slots, x.positions, x.workspace, tile=plan, rank=RANK, scale=SCALE, pdl=True
        )  # fmt: skip

    return {
        "step": [step(*each) for each in zip(x.pools, x.weights, strict=True)],
        "attend": [attend(pool) for pool in x.pools],
    }


def flashinfer(x: Inputs) -> dict[str, list]:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper
    from flashinfer.page import append_paged_mla_kv_cache

    counts = torch.full((x.batch,), x.context, dtype=torch.int32)
    starts, pages = torch.arange(x.batch + 1, dtype=torch.int32), x.table.shape[1]
    indptr, indices = starts * pages, x.table.flatten()
    wrapper = BatchMLAPagedAttentionWrapper(torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"))
    wrapper.plan(starts, indptr, indices, counts, x.heads, RANK, ROPE, PAGE, False, SCALE, DTYPE, DTYPE)
    last = (x.positions % PAGE + 1).int()
    place = (x.slots, x.positions)
    on_device = indptr.cuda()
    query, rotated = random(x.batch, x.heads, RANK), random(x.batch, x.heads, ROPE)
    q = x.q.view(x.batch, x.heads, -1)[..., :NOPE].transpose(0, 1)
    latent, rotated_key = x.key[:, :RANK].contiguous(), x.key[:, RANK:].contiguous()
    out = random(x.batch, x.heads, VALUE).transpose(0, 1)
    caches = [(pool[..., :RANK].contiguous(), pool[..., RANK:].contiguous()) for pool in x.pools]

    def attend(cache):
        return lambda: wrapper.run(query, rotated, *cache)

    def step(cache, weights):
        def call():
            append_paged_mla_kv_cache(latent, rotated_key, *place, *cache, indices, on_device, last)
            torch.bmm(q, weights[0], out=query.transpose(0, 1))
            mixed = wrapper.run(query, rotated, *cache)
            torch.bmm(mixed.transpose(0, 1), weights[1], out=out)

        return call

    return {
        "fi step": [step(*each) for each in zip(caches, x.weights, strict=True)],
        "fi attend": [attend(cache) for cache in caches],
    }


def difference(x: Inputs) -> float:
    """Largest difference of both attentions' results, over the largest result."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    torch.manual_seed(1)
    query = random(x.batch, x.heads, WIDTH)
    found = decode.attend(
        query, x.pools[0], x.table, x.slots, x.positions, x.workspace,
        tile=decode.plan_for(x.heads, x.pools[0], RANK), rank=RANK, scale=SCALE, pdl=False,
    )  # fmt: skip
    counts = torch.full((x.batch,), x.context, dtype=torch.int32)
    starts = torch.arange(x.batch + 1, dtype=torch.int32)
    wrapper = BatchMLAPagedAttentionWrapper(torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"))
    wrapper.plan(
        starts, starts * x.table.shape[1], x.table.flatten(), counts, x.heads, RANK, ROPE, PAGE, False, SCALE, DTYPE,
        DTYPE,
    )  # fmt: skip
    cache = x.pools[0][..., :RANK].contiguous(), x.pools[0][..., RANK:].contiguous()
    expected = wrapper.run(query[..., :RANK].contiguous(), query[..., RANK:].contiguous(), *cache)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_bandwidth(torch.device("cuda"))
    rows: list[dict] = []
    for heads in args.heads:
        for batch, context in SHAPES[heads]:
            inputs = Inputs(heads, batch, context)
            gc.collect()
            gc.freeze()
            times = alternating_microseconds(ours(inputs) | flashinfer(inputs), repeats=11)
            read = batch * context * WIDTH * 2 / copy * 1e6
            row = {"heads": heads, "batch": batch, "context": context, "us": times, "read": read}
            rows.append(row | {"difference": difference(inputs)})
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(
                    json.dumps({"copy": copy, "machine": machine_facts(), "rows": rows}, indent=1) + "\n"
                )


if __name__ == "__main__":
    main()
