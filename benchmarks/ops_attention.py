"""Attention operators on one GPU beside FlashInfer called directly, under CUDA graphs, in the same run.

    python benchmarks/ops_attention.py [--full] [--only decode prefill mla] [--json FILE]

Every time is a median of graph replays, the graphs of a row replayed in turn. A graph holds several layers with caches
of their own, more bytes than the L2 cache where 16 layers suffice for that, as a decoder's layers do; times are for one
layer. Data are random. `fi run` is FlashInfer's attention alone, `fi` with its append, as our operators do it. For MLA
`products` are the two products that absorb the weight, alone, with torch.bmm and as `our_products`.
"""

import argparse
import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import shardwise.ops  # noqa: F401  registers the operators
from shardwise.launch.machine import machine_facts
from shardwise.ops.attention.planner import decode_graphs
from shardwise.ops.bench.measure import alternating_microseconds
from shardwise.ops.mla.absorb import Rows
from shardwise.ops.mla.checks import LatentHeads, split_weight
from shardwise.ops.mla.step import absorbing

OPS = torch.ops.auto_deploy
HEADS, KV_HEADS, SIZE, PAGE = 64, 8, 128, 64
FOOTPRINT = 256 * 1024**2  # bytes that the layers of one graph read: several times the L2 cache
DTYPE = torch.bfloat16
REPLAYS = 11  # of a graph, whose median counts


class Pool:
    """One large random buffer that all caches are views of."""

    def __init__(self, elements: int):
        self.buffer = torch.empty(elements, dtype=DTYPE, device="cuda")
        for part in self.buffer.split(1 << 28):
            part.normal_()

    def layers(self, elements: int, most: int = 16) -> list[torch.Tensor]:
        count = max(1, min(most, -(-FOOTPRINT // (2 * elements)), self.buffer.numel() // elements))
        return [self.buffer[i * elements : (i + 1) * elements] for i in range(count)]


@dataclass(frozen=True)
class Batch:
    """`batch` sequences of `length` tokens after the step, `new` of them new."""

    batch: int
    length: int
    new: int

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    def info(self) -> torch.Tensor:
        decode = self.new == 1
        return torch.tensor([0, 0, self.batch] if decode else [self.batch, self.tokens, 0], dtype=torch.int32)

    def unpaged(self):
        """batch_info_host, seq_len, input_pos, slot_idx, cu_seqlen."""
        ints = {"dtype": torch.int32, "device": "cuda"}
        new, past = (torch.full((self.batch,), n, **ints) for n in (self.new, self.length - self.new))
        starts = torch.arange(self.batch + 1, **ints) * self.new
        return self.info(), new, past, torch.arange(self.batch, device="cuda"), starts

    def paged(self):
        """Host and device page metadata in the operators' order, and the step's batch indices and positions."""
        pages = -(-self.length // PAGE)
        starts = torch.arange(self.batch + 1, dtype=torch.int32) * pages
        order = torch.randperm(self.batch * pages, device="cuda").int()
        last = torch.full((self.batch,), (self.length - 1) % PAGE + 1, dtype=torch.int32)
        total = torch.full((self.batch,), self.length, dtype=torch.int32)
        cu_seqlen = torch.arange(self.batch + 1, dtype=torch.int32) * self.new
        arguments = (self.info(), cu_seqlen, starts.cuda(), starts, order, last.cuda(), last, total)
        inputs = (torch.zeros(1, self.tokens, device="cuda"), self.info(), cu_seqlen.cuda(), total.cuda())
        return arguments, inputs


def random(*shape) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def qkv(tokens: int):
    return random(1, tokens, HEADS, SIZE), random(1, tokens, KV_HEADS, SIZE), random(1, tokens, KV_HEADS, SIZE)


def cache_layers(pool: Pool, sequences: int, length: int, most: int = 16):
    """For each layer: k_cache and v_cache unpaged, and the same memory as a paged cache."""
    pages = -(-length // PAGE)
    for part in pool.layers(sequences * pages * PAGE * KV_HEADS * SIZE * 2, most):
        unpaged = part.view(2, sequences, pages * PAGE, KV_HEADS, SIZE)
        yield unpaged[0], unpaged[1], part.view(sequences * pages, 2, KV_HEADS, PAGE, SIZE)


def triton_calls(shape: Batch, pool: Pool, most: int = 16):
    tensors, metadata = qkv(shape.tokens), shape.unpaged()
    operator = OPS.triton_attention_flattened_mha_with_cache
    layers = cache_layers(pool, shape.batch, shape.length, most)
    return [partial(operator, *tensors, *metadata, k, v, None) for k, v, _ in layers]


def in_order(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def call():
        first()
        second()

    return call


def flashinfer_calls(shape: Batch, pool: Pool, most: int = 16):
    """FlashInfer with append, FlashInfer's attention alone, our operator on FlashInfer."""
    import flashinfer

    tensors, (arguments, inputs) = qkv(shape.tokens), shape.paged()
    metadata = OPS.flashinfer_attention_prepare_metadata(*inputs)
    info, cu_seqlen, indptr, indptr_host, indices, last, last_host, total = arguments
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    common = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "page_size": PAGE, "seq_lens": total,
              "sm_scale": SIZE**-0.5, "q_data_type": DTYPE, "kv_data_type": DTYPE}  # fmt: skip
    if shape.new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_cuda_graph=True, use_tensor_cores=True, backend="fa2",
            paged_kv_indptr_buffer=indptr.clone(), paged_kv_indices_buffer=indices.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
        )  # fmt: skip
        wrapper.plan(indptr_host, indices, last_host, head_dim=SIZE, **common)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa2")
        wrapper.plan(cu_seqlen, indptr_host, indices, last_host, head_dim_qk=SIZE, causal=True, **common)
    q, k, v = (x[0] for x in tensors)
    out = torch.empty_like(q)

    operator, append = OPS.flashinfer_attention_mha_with_cache, flashinfer.append_paged_kv_cache
    caches = [cache for *_, cache in cache_layers(pool, shape.batch, shape.length, most)]
    appends = [partial(append, k, v, *metadata, each, indices, indptr, last, kv_layout="HND") for each in caches]
    runs = [partial(wrapper.run, q, each, out=out) for each in caches]
    direct = [in_order(*both) for both in zip(appends, runs, strict=True)]
    return direct, runs, [partial(operator, *tensors, *arguments, *metadata, each, None, 1.0, 1.0) for each in caches]


def decode_rows(full: bool, pool: Pool):
    batches = (1, 2, 4, 8, 16, 32, 64, 128) if full else (1, 8, 32, 128)
    lengths = (1024, 2048, 4096, 8192, 16384, 32768) if full else (1024, 8192, 32768)
    for batch in batches:
        for length in lengths:
            shape = Batch(batch, length, 1)
            row = {"kind": "decode", "batch": batch, "length": length}
            row["bytes"] = 2 * 2 * batch * length * KV_HEADS * SIZE
            row |= measured(shape, pool, 16)
            row["triton_gb_per_s"] = row["bytes"] / row["triton_us"] / 1e3
            row["fi_run_gb_per_s"] = row["bytes"] / row["fi_run_us"] / 1e3
            yield row | shares(row)


def prefill_rows(full: bool, pool: Pool):
    lengths = (1024, 2048, 4096, 8192, 16384) if full else (1024, 4096, 16384)
    for batch, length, past in [(1, n, 0) for n in lengths] + [(8, 1024, 0), (1, 2048, 14336)]:
        shape = Batch(batch, length + past, length)
        pairs = batch * (length * (length + 1) // 2 + length * past)
        row = {"kind": "prefill", "batch": batch, "length": length, "past": past, "flop": 4 * pairs * HEADS * SIZE}
        row |= measured(shape, pool, 1)
        for name in ("triton", "fi_run"):
            row[f"{name}_tflops"] = row["flop"] / row[f"{name}_us"] / 1e6
        yield row | shares(row)


def measured(shape: Batch, pool: Pool, layers: int) -> dict:
    with decode_graphs():
        direct, run, operator = flashinfer_calls(shape, pool, layers)
        variants = {"triton": triton_calls(shape, pool, layers), "fi": direct, "fi_run": run, "fi_operator": operator}
        return {f"{name}_us": time for name, time in alternating_microseconds(variants, repeats=REPLAYS).items()}


def shares(row: dict) -> dict:
    return {
        "triton_share_of_fi_run": row["fi_run_us"] / row["triton_us"],
        "operator_over_fi": row["fi_operator_us"] / row["fi_us"] - 1,
    }


MLA = LatentHeads(128, 128, 64, 128, 512)
MLA_LAYERS = 4  # 134 MB of weights


@dataclass(frozen=True)
class MlaLayer:
    weight: torch.Tensor  # [N * (Dn + Dv), R]
    ckv: torch.Tensor  # [pages, PAGE, R]
    kpe: torch.Tensor  # [pages, PAGE, Dr]

    @classmethod
    def of(cls, cache: torch.Tensor) -> "MlaLayer":
        """`cache` holds all pages, [tokens * (R + Dr)]."""
        latents = cache.numel() // (MLA.rank + MLA.rope) * MLA.rank
        weight = random(MLA.count * (MLA.nope + MLA.value), MLA.rank) / math.sqrt(MLA.rank)
        return cls(weight, cache[:latents].view(-1, PAGE, MLA.rank), cache[latents:].view(-1, PAGE, MLA.rope))


def mla_calls(shape: Batch, pool: Pool, most: int = MLA_LAYERS):
    """Decode of 128 heads: our operator, what it does by FlashInfer and torch.bmm called directly, FlashInfer's
    attention alone, and the two products, by torch.bmm and as the operator makes them."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper
    from flashinfer.page import append_paged_mla_kv_cache

    heads, nope, rope, value, rank = MLA
    arguments, inputs = shape.paged()
    metadata = OPS.flashinfer_mla_prepare_metadata(*inputs)
    _, cu_seqlen, indptr, indptr_host, indices, last, _, total = arguments
    size = len(indices) * PAGE * (rank + rope)
    layers = [MlaLayer.of(pool.buffer[i * size : (i + 1) * size]) for i in range(most)]
    q_nope, q_pe = random(1, shape.batch, heads, nope), random(1, shape.batch, heads, rope)
    latent, rotated_key = random(1, shape.batch, rank), random(1, shape.batch, 1, rope)
    absorbed, rotated = random(shape.batch, heads, rank), random(shape.batch, heads, rope)
    wrapper = BatchMLAPagedAttentionWrapper(torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"))
    wrapper.plan(cu_seqlen, indptr_host, indices, total, heads, rank, rope, PAGE, False, 0.07, DTYPE, DTYPE)
    by_head, out = q_nope[0].transpose(0, 1), random(shape.batch, heads, value)
    new_latent, new_kpe = latent[0], rotated_key[0, :, 0]
    latents, result = absorbed.transpose(0, 1), out.transpose(0, 1)
    ours = absorbing(MLA, layers[0].weight, Rows(heads * nope, nope), 0, shape.batch, q_nope)

    def operator(layer):
        tensors = (q_nope, q_pe, latent, rotated_key, layer.weight, *arguments, *metadata, layer.ckv, layer.kpe)
        return partial(OPS.flashinfer_mla_with_cache, *tensors, None, rank)

    def direct(layer):
        w_key, w_value = split_weight(layer.weight, MLA)
        w_value, caches = w_value.transpose(1, 2), (layer.ckv, layer.kpe)
        append = partial(append_paged_mla_kv_cache, new_latent, new_kpe, *metadata, *caches, indices, indptr, last)
        absorb = partial(torch.bmm, by_head, w_key, out=latents)
        run = partial(wrapper.run, absorbed, rotated, *caches)
        release = partial(torch.bmm, mat2=w_value, out=result)

        def call():
            append()
            absorb()
            release(run().transpose(0, 1))

        return call

    def products(layer):
        w_key, w_value = split_weight(layer.weight, MLA)
        torch.bmm(by_head, w_key, out=latents)
        torch.bmm(latents, w_value.transpose(1, 2), out=result)

    def our_products(layer):
        ours.absorb(q_nope, layer.weight, absorbed)
        ours.release(absorbed, layer.weight, out)

    return {
        "fi_operator": [operator(layer) for layer in layers],
        "fi": [direct(layer) for layer in layers],
        "fi_run": [lambda layer=layer: wrapper.run(absorbed, rotated, layer.ckv, layer.kpe) for layer in layers],
        "products": [lambda layer=layer: products(layer) for layer in layers],
        "our_products": [lambda layer=layer: our_products(layer) for layer in layers],
    }


def mla_rows(full: bool, pool: Pool):
    for batch, length in ((1, 8192), (32, 4096), (128, 4096)) if full else ((32, 4096),):
        row = {"kind": "mla decode", "batch": batch, "length": length, "bytes": 2 * batch * length * 576}
        row["weight_bytes"] = 2 * 128 * (128 + 128) * 512
        with decode_graphs():
            times = alternating_microseconds(mla_calls(Batch(batch, length, 1), pool), repeats=REPLAYS)
        row["operator_over_fi"] = times["fi_operator"] / times["fi"] - 1
        yield row | {f"{name}_us": time for name, time in times.items()}


KINDS = {"decode": decode_rows, "prefill": prefill_rows, "mla": mla_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole sweep of sizes instead of a few")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()  # a capture collects garbage, and need not walk over all of PyTorch each time
    pool = Pool(128 * 32768 * KV_HEADS * SIZE * 2)
    rows = []
    for kind in args.only:
        for row in KINDS[kind](args.full, pool):
            rows.append(row)
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
