"""Prefill of latent attention on one GPU, one sequence of new tokens, beside PyTorch's and FlashInfer's attention.

    python benchmarks/mla_prefill.py [--heads 16 128] [--tokens 1024 4096 16384] [--flashinfer fa2 fa3] [--json FILE]

`ours` expands keys and values from the latents and attends; `expand` is the expansion alone, by the same two products.
`torch` and FlashInfer attend to keys and values expanded before. Times are medians of graph replays in turn. FlashInfer
compiles each of its kernels at the first use, for minutes on few cores, where its packages do not hold them already.
TFLOPS count 320 multiplications and as many additions for each pair of a query and a key that it sees, and for `ours`
those of the expansion.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import alternating_microseconds
from shardwise.ops.mla import prefill

NOPE, RANK, ROPE, VALUE = 128, 512, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
DTYPE = torch.bfloat16


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def by_flashinfer(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    tokens, heads = q.shape[:2]
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    wrapper.plan(
        bounds, bounds, heads, heads, NOPE + ROPE, head_dim_vo=VALUE, causal=True, sm_scale=SCALE, q_data_type=DTYPE
    )
    return lambda: wrapper.run(q, k, v)


def calls(heads: int, tokens: int, backends: list[str]) -> dict:
    q, latents = random(tokens, heads, NOPE + ROPE), random(tokens, RANK + ROPE)
    key_up, value_up = random(heads, NOPE, RANK) / RANK**0.5, random(heads, RANK, VALUE) / RANK**0.5
    tile = prefill.tile_for(tokens, q.element_size())
    runs = prefill.runs_in_tiles([prefill.Run(0, tokens, 0, 0)], tile.queries)
    tiles = torch.tensor(runs, dtype=torch.int32, device="cuda")
    seen = latents[:, :RANK].expand(heads, tokens, RANK)

    def expand():
        return torch.bmm(seen, key_up.transpose(1, 2)), torch.bmm(seen, value_up)

    k, v = (each.transpose(0, 1).contiguous() for each in expand())
    k = torch.cat((k, latents[:, None, RANK:].expand(tokens, heads, ROPE)), 2)
    by_head = [each.transpose(0, 1)[None] for each in (q, k, v)]
    found = {
        "ours": lambda: prefill.latent_prefill_attention(
            q, latents, key_up, value_up, tiles, tile, scale=SCALE, pdl=True
        ),
        "torch": lambda: scaled_dot_product_attention(*by_head, is_causal=True, scale=SCALE)[0].transpose(0, 1),
    }
    for backend in backends:
        found[f"flashinfer {backend}"] = by_flashinfer(backend, q, k, v)
    expected = found["ours"]().float()
    for name, call in found.items():
        difference = ((call().float() - expected).norm() / expected.norm()).item()
        assert difference < 1e-2, f"{name} differs by {difference:.3f} of the norm"
    return found | {"expand": expand}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--flashinfer", nargs="+", default=[], choices=["fa2", "fa3"], help="its kernels, by name")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []
    for heads in args.heads:
        for tokens in args.tokens:
            variants = calls(heads, tokens, args.flashinfer)
            times = alternating_microseconds({name: [call] * 2 for name, call in variants.items()}, repeats=5)
            attention = tokens * tokens * heads * (NOPE + ROPE + VALUE)
            expansion = 2 * tokens * heads * RANK * (NOPE + VALUE)
            flops = dict.fromkeys(variants, attention) | {"expand": expansion, "ours": attention + expansion}
            rows.append(
                {"heads": heads, "tokens": tokens, "us": times, "tokens/s": tokens / times["ours"] * 1e6}
                | {"TFLOPS": {name: flops[name] / time / 1e6 for name, time in times.items()}}
            )
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
