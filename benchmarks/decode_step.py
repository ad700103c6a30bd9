"""The decode step of real models on GPUs: tokens a second of the engine, the step by itself, and its kernels.

    python benchmarks/decode_step.py benchmarks/shapes/llama-3.1-8b.json --json FILE
    python -m torch.distributed.run --nproc-per-node 2 benchmarks/decode_step.py CONFIG --ep 2 --batch 1 64 --json FILE

Random weights of the config's shapes. For each batch size: the engine generates (steps launched ahead, tokens read one
step late); the captured step is replayed alone; a profiler lists what ran in it, kernel by kernel in order; and each
kind of kernel is timed by itself, one launch a layer in a graph, so that no weights wait in the L2 cache. Bytes are
what a kernel must read once; the bandwidth limit is a plain copy's of the same run. Rows are written as they come.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

for _name, _value in (
    ("NCCL_NVLS_ENABLE", "0"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

from shardwise.comm.rank import use_groups  # noqa: E402
from shardwise.comm.strategy import create, make_groups  # noqa: E402
from shardwise.launch.env import detect  # noqa: E402
from shardwise.launch.machine import machine_facts  # noqa: E402
from shardwise.ops.attention.decode import fused_decode_attention  # noqa: E402
from shardwise.ops.linear.decode import skinny_linear  # noqa: E402
from shardwise.ops.moe.decode import expert_down, expert_up  # noqa: E402
from shardwise.parallel.batch import Batch, Span  # noqa: E402
from shardwise.parallel.decode_moe import ExpertStep  # noqa: E402
from shardwise.parallel.decode_stream import SKINNY_ROWS, Product  # noqa: E402
from shardwise.parallel.engine import Engine, SamplingParams  # noqa: E402
from shardwise.parallel.layers import GatedMlp  # noqa: E402
from shardwise.parallel.moe import PackedExperts  # noqa: E402
from shardwise.parallel.traffic import copy_bandwidth, step_bytes  # noqa: E402
from shardwise.sharding.checkpoint.resolve import random_checkpoint  # noqa: E402
from shardwise.sharding.layout import ParallelLayout  # noqa: E402
from shardwise.sharding.plan import plan  # noqa: E402

REPEATS = 9


class Report:
    """Prints rows on rank 0 and writes all of them after each."""

    def __init__(self, path: str | None, speaks: bool, head: dict):
        self.path, self.speaks, self.found = path, speaks, {**head, "rows": []}

    def add(self, row: dict) -> None:
        self.found["rows"].append(row)
        if not self.speaks:
            return
        print(json.dumps(row), flush=True)
        if self.path:
            with open(self.path, "w") as file:
                json.dump(self.found, file, indent=1)


def milliseconds(run: Callable[[], object], groups, repeats: int = REPEATS) -> float:
    """Median time of `run`, the slowest rank's."""
    samples = []
    for _ in range(repeats):
        groups.world.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return max(groups.world.all_gather_object(statistics.median(samples)))


def generated(engine: Engine, batch: int, prompt: int, count: int) -> dict:
    """Decode tokens a second, over the steps behind everybody's first token; and the time to the first ones."""
    vocab = engine.plan.model.vocab
    prompts = [[(31 * row + 7 * place) % (vocab - 1) for place in range(prompt)] for row in range(batch)]
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    rates, firsts = [], []
    for _ in range(3):
        engine.groups.world.barrier()
        begin, arrivals = time.perf_counter(), [[] for _ in prompts]
        for event in engine.stream(prompts, params):
            arrivals[event.request].append(time.perf_counter() - begin)
        first = max(times[0] for times in arrivals)
        later = sum(at > first for times in arrivals for at in times)
        rates.append(later / (max(times[-1] for times in arrivals) - first))
        firsts.append(first)
    return {"tokens_per_second": statistics.median(rates), "first_token_ms": 1e3 * statistics.median(firsts)}


def steady_batch(engine: Engine, batch: int, context: int) -> Batch:
    """Sequences of `context` tokens, whose cache holds whatever it holds."""
    for slot in range(batch):
        engine._cache.release(slot)
        if not engine._cache.reserve(slot, context + 1):
            raise SystemExit(f"the cache has no room for {batch} sequences of {context} tokens")
    spans = [Span(slot, context, 1) for slot in range(batch)]
    pages = Batch([Span(slot, 0, context) for slot in range(batch)], [1] * (batch * context), engine.device)
    engine._cache._of(pages)  # enters the page table
    tokens = [(977 * slot + 13) % engine.plan.model.vocab for slot in range(batch)]
    return Batch(spans, tokens, engine.device)


def replayed(engine: Engine, batch: Batch) -> tuple[Callable[[], None], torch.Tensor]:
    graphs = engine._runner._graphs
    graphs.launch(batch).tokens()
    size = next(s for s in graphs.sizes if s >= len(batch.spans))
    graph, inputs, _ = graphs._graphs[size]
    return graph.replay, inputs


def kernel_list(run: Callable[[], None]) -> list[list]:
    """(name, microseconds) of the kernels of one replay, in the order in which they began."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run()
        torch.cuda.synchronize()
    found = [event for event in watched.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    found.sort(key=lambda event: event.time_range.start)
    begin = found[0].time_range.start if found else 0
    return [[e.name[:60], e.time_range.start - begin, e.time_range.end - begin] for e in found]


def summary(kernels: list[list]) -> dict[str, dict]:
    """By name: launches, microseconds (kernels that begin early count their wait), and those until the next began."""
    table: dict[str, dict] = {}
    for place, (name, start, end) in enumerate(kernels):
        row = table.setdefault(name, {"launches": 0, "busy_us": 0.0, "until_next_us": 0.0})
        row["launches"] += 1
        row["busy_us"] += end - start
        following = kernels[place + 1][1] if place + 1 < len(kernels) else end
        row["until_next_us"] += following - start
    return {name: {k: round(v, 2) for k, v in row.items()} for name, row in table.items()}


@dataclass
class Kind:
    """One kind of kernel: a launch for each layer, and the bytes that one reads."""

    calls: list[Callable[[], object]]
    nbytes: float


def kinds(engine: Engine, batch: int, context: int) -> dict[str, Kind]:
    """The kernels of a step by kind, on inputs that stay; only those of few tokens."""
    step, decoder, device, dtype = engine._runner._graphs.step, engine._decoder, engine.device, engine.dtype
    hidden = engine.plan.model.hidden
    x, positions = torch.randn(batch, hidden, device=device).to(dtype), torch.full((batch,), context, device=device)
    positions, slots = positions.int(), torch.arange(batch, device=device, dtype=torch.int32)
    found: dict[str, Kind] = {}

    def add(name: str, calls: list, nbytes: float) -> None:
        found[name] = Kind(calls, nbytes)

    def product(p: Product, inputs: torch.Tensor, **options) -> Callable[[], object]:
        if batch > SKINNY_ROWS:
            return lambda: torch.nn.functional.linear(inputs, p.weight, p.bias)
        return lambda: skinny_linear(inputs, p.weight, bias=p.bias, pdl=True, **options)

    layers, first = step._layers, step._layers[0]
    norm = decoder.first_norm.weight
    normed = {} if batch > SKINNY_ROWS else dict(norm_weight=norm, eps=1e-5)
    add("qkv", [product(la.qkv, x, **normed) for la in layers], first.qkv.weight.nbytes)
    inner = torch.randn(batch, first.out.weight.shape[1], device=device).to(dtype)
    add("out", [product(la.out, inner) for la in layers], first.out.weight.nbytes)
    add("head", [product(step._head, x)] * 2, step._head.weight.nbytes)
    for name, window in (("attention", None), ("attention with a window", True)):
        chosen = [(n, la) for n, la in enumerate(layers) if bool(la.mixer.masking.window) == bool(window)]
        if chosen:
            seen = min(context, chosen[0][1].mixer.masking.window or context)
            mixer = chosen[0][1].mixer
            nbytes = batch * seen * mixer.kv_heads * 2 * mixer.head_dim * dtype.itemsize
            add(name, [attention(step, n, la, batch, positions, slots) for n, la in chosen], nbytes)
    inners = [layer.feed_forward for layer in decoder.layers]
    if isinstance(inners[0], GatedMlp) and batch <= SKINNY_ROWS:
        products = [(Product.of(i.gate_up), Product.of(i.down)) for i in inners]
        wide = torch.randn(batch, products[0][1].weight.shape[1], device=device).to(dtype)
        gates = [(lambda p=p: skinny_linear(x, p.weight, norm_weight=norm, gated=True, pdl=True)) for p, _ in products]
        add("gate and up", gates, products[0][0].weight.nbytes)
        add("down", [product(p, wide) for _, p in products], products[0][1].weight.nbytes)
    moe = [la.feed_forward for la in layers if isinstance(la.feed_forward, ExpertStep)]
    if moe and batch <= moe[0]._most_few:
        expert_kinds(add, moe, x, positions)
    if decoder.head.group.size > 1:
        group, residual = decoder.head.group, torch.randn_like(x)
        sums = [lambda: group.all_reduce_residual_rms_norm(x, residual, norm, 1e-5)] * len(layers)
        add("all-reduce + residual + norm", sums, 2 * x.nbytes)
    return found


def attention(step, number: int, layer, batch: int, positions, slots) -> Callable[[], object]:
    mixer, cache = layer.mixer, step.cache
    qkv = torch.randn(batch, layer.qkv.weight.shape[0], device=positions.device).to(cache.dtype)
    q_norm = mixer.q_norm.weight if mixer.q_norm else None
    return lambda: fused_decode_attention(
        qkv,
        *cache.pages(number),
        cache.table,
        positions,
        layer.rope,
        cache.workspace(mixer.heads, mixer.kv_heads, mixer.head_dim),
        heads=mixer.heads,
        slots=slots,
        splits=cache.splits(mixer.kv_heads, mixer.masking.window, batch),
        scale=mixer.masking.scale,
        q_norm=q_norm,
        k_norm=mixer.k_norm.weight if mixer.k_norm else None,
        sinks=mixer.masking.sinks,
        window=mixer.masking.window,
        pdl=True,
    )


def expert_kinds(add, moe: list[ExpertStep], x: torch.Tensor, positions: torch.Tensor) -> None:
    ready = []
    for each in moe:
        experts = each.block.experts
        biases = (getattr(experts, "up_gate_bias", None), getattr(experts, "down_bias", None))
        logits = torch.randn(x.shape[0], len(each._slots), device=x.device)
        up = dict(bias=biases[0], positions=positions, pdl=True)
        inputs = x if isinstance(experts, PackedExperts) else x.float()
        args = (inputs, logits, each._slots, each._choice, experts.up_gate, each._gate)
        ready.append((each, experts, biases, args, up, expert_up(*args, **up)))
    each, experts = ready[0][:2]
    chosen = statistics.mean(int((r[-1].ids >= 0).sum()) for r in ready)
    routers = [lambda e=e: skinny_linear(x, e._router, bias=e._bias, pdl=True) for e, *_ in ready]
    add("router", routers, each._router.nbytes)
    add(
        "experts up",
        [lambda a=a, o=o: expert_up(*a, **o) for _, _, _, a, o, _ in ready],
        chosen * of_one(experts.up_gate),
    )
    downs = [lambda e=e, b=b, r=r: expert_down(r, e.down, bias=b[1], pdl=True) for _, e, b, _, _, r in ready]
    add("experts down", downs, chosen * of_one(experts.down))


def of_one(weight) -> float:
    """Bytes of one expert's matrix."""
    if hasattr(weight, "words"):
        return (weight.words.nbytes + weight.scales.nbytes) / weight.words.shape[0]
    return weight.nbytes / weight.shape[0]


def timed_kinds(engine: Engine, batch: int, context: int, bandwidth: float) -> dict[str, dict]:
    rows = {}
    for name, kind in kinds(engine, batch, context).items():
        for call in kind.calls[:1]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in kind.calls:
                call()
        graph.replay()
        us = 1e3 * milliseconds(graph.replay, engine.groups) / len(kind.calls)
        rows[name] = {
            "us": round(us, 2),
            "launches_a_step": 1 if name == "head" else len(kind.calls),
            "megabytes": round(kind.nbytes / 1e6, 3),
            "share_of_copy": round(kind.nbytes / (us * 1e-6) / bandwidth, 3),
        }
    return rows


def measure(engine: Engine, args, report: Report, bandwidth: float) -> None:
    for batch in args.batch:
        row = {"batch": batch, "context": args.context}
        row |= generated(engine, batch, args.context, args.output)
        report.add({**row, "path": engine.decode_path, "cache": engine.stats().cache})
        with torch.inference_mode():
            steady = steady_batch(engine, batch, args.context)
            run, _ = replayed(engine, steady)
            ms = milliseconds(run, engine.groups)
            read = step_bytes(
                engine._decoder,
                engine.plan,
                engine.groups.world.rank,
                batch=batch,
                context=args.context,
                cache_itemsize=engine.dtype.itemsize,
            )
            limit = read.total / bandwidth * 1e3
            step = {"step_ms": ms, "limit_ms": limit, "limit_tokens_per_second": 1e3 * batch / limit}
            report.add({"batch": batch, **step, "bytes": read.total})
            if not args.quick:
                kernels = kernel_list(run)
                report.add({"batch": batch, "kernels": summary(kernels), "order": kernels[40:64]})
                report.add({"batch": batch, "kinds": timed_kinds(engine, batch, args.context, bandwidth)})
            for slot in range(batch):
                engine._cache.release(slot)


def transformers_rate(config: str, prompt: int, count: int) -> float:
    """Tokens a second of Transformers, greedy, on the same random shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with open(config) as file:
        fields = json.load(file)
    made = AutoConfig.for_model(fields.pop("model_type"), **{k: v for k, v in fields.items() if k != "architectures"})
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    ids = torch.ones(1, prompt, dtype=torch.int64, device="cuda")
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(ids, max_new_tokens=4, **options)
    times = {}
    for new in (2, count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        torch.cuda.synchronize()
        times[new] = time.perf_counter() - begin
    return (count - 2) / (times[count] - times[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--layers", type=int, help="only so many layers: to compile all kernels soon")
    parser.add_argument("--cache-tokens", type=int)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--quick", action="store_true", help="no kernels")
    parser.add_argument("--transformers", action="store_true", help="Transformers beside it, on one GPU")
    parser.add_argument("--json")
    args = parser.parse_args()
    info = detect()
    torch.cuda.set_device(info.local_rank)
    device = f"cuda:{info.local_rank}"
    world = create(info, device="cuda", transport=args.transport)
    layout = ParallelLayout(tp=info.world, moe_ep=args.ep)
    groups = make_groups(world, layout)
    checkpoint = random_checkpoint(args.config)
    if args.layers:
        checkpoint = replace(checkpoint, config=shortened(checkpoint.config, args.layers))
    made = plan(checkpoint.config, layout) if args.layers else plan(args.config, layout)
    head = {"config": os.path.basename(args.config), "tp": info.world, "ep": args.ep, "machine": machine_facts()}
    with use_groups(groups):
        engine = Engine(checkpoint, made, groups, device=device, cache_tokens=args.cache_tokens)
        bandwidth = copy_bandwidth(engine.device)
        report = Report(args.json, info.rank == 0, head)
        report.add(
            {"copy_bytes_per_second": bandwidth, "transport": world.transport, "load": engine.stats().load_seconds}
        )
        measure(engine, args, report, bandwidth)
        if args.transformers and info.world == 1:
            del engine
            torch.cuda.empty_cache()
            report.add({"transformers_tokens_per_second": transformers_rate(args.config, args.context, 34)})
    world.close()


def shortened(config: dict, layers: int) -> dict:
    kinds = config.get("layer_types")
    return config | {"num_hidden_layers": layers} | ({"layer_types": kinds[:layers]} if kinds else {})


if __name__ == "__main__":
    main()
