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
from dataclasses import replace

from shardwise.launch import env

os.environ.update(env.NO_MULTICAST)

import torch
from decode_kinds import kinds

from shardwise.comm.rank import use_groups
from shardwise.comm.strategy import create, make_groups
from shardwise.launch.machine import machine_facts
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.traffic import copy_bandwidth, step_bytes
from shardwise.sharding.checkpoint.resolve import random_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan

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
    """Decode tokens a second, over the steps after everybody's first token; and the time to the first ones."""
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
    cache, vocab = engine.cache, engine.plan.model.vocab
    for slot in range(batch):
        cache.release(slot)
        if not cache.reserve(slot, context + 1):
            raise SystemExit(f"the cache has no room for {batch} sequences of {context} tokens")
    cache.place(Batch([Span(slot, 0, context) for slot in range(batch)], [1] * (batch * context), engine.device))
    tokens = [(977 * slot + 13) % vocab for slot in range(batch)]
    return Batch([Span(slot, context, 1) for slot in range(batch)], tokens, engine.device)


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


def timed_kinds(engine: Engine, batch: int, context: int, bandwidth: float) -> dict[str, dict]:
    rows = {}
    for name, kind in kinds(engine.decoder, engine.runner.graphs.step, batch, context).items():
        kind.calls[0]()
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
            run = engine.runner.graphs.replay(steady_batch(engine, batch, args.context))
            ms = milliseconds(run, engine.groups)
            read = step_bytes(
                engine.decoder,
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
                engine.cache.release(slot)


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
    info = env.detect()
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
