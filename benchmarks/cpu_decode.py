"""Greedy decode of SmolLM2 (float32, batch 1) on CPU ranks, beside Transformers and the machine's bandwidth limit.

    python benchmarks/cpu_decode.py [--tp 2] [--tokens 96] [--rounds 3] [--json FILE]

Each round runs Shardwise (tp ranks, one thread each) and Transformers (one process, as many threads as there are
ranks) one after the other on the same file and prompt, and first compares their tokens. A row is the median over
rounds, with the fastest beside it: other load on the machine slows both. The limit: a token streams each weight of the
fullest rank once, at the rate at which all ranks together, one thread each, stream float32 matrix-vector products.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

QUESTION = [{"role": "user", "content": "Explain why the sky is blue."}]
MATRIX = (1536, 576)
"""The shape of the model's gate and up projection of one of two ranks."""
STREAMED_BYTES = 256 << 20


def stream_rate(info, store) -> float:
    """Bytes a second of one-row products over more weights than any cache holds, all ranks at once."""
    import torch

    from shardwise.comm.strategy import create
    from shardwise.parallel.layers import Linear

    torch.set_num_threads(1)
    group = create(info, store=store)
    rows, columns = MATRIX
    count = STREAMED_BYTES // (4 * rows * columns)
    best = 0.0
    with torch.inference_mode():
        products = [Linear(weight=torch.randn(MATRIX)) for _ in range(count)]
        x = torch.randn(1, columns)
        for _ in range(16):
            group.barrier()
            start = time.perf_counter()
            for product in products:
                product(x)
            best = max(best, count * rows * columns * 4 / (time.perf_counter() - start))
    return best


def decode(info, store, tp: int, tokens: int) -> dict:
    """One rank: load, generate twice, time the second run."""
    import torch

    from shardwise.comm.strategy import create, make_groups
    from shardwise.parallel.engine import Engine, SamplingParams
    from shardwise.sharding.plan import plan

    torch.set_num_threads(1)
    made = plan("smollm2", tp=tp)
    group = create(info, store=store)
    engine = Engine("smollm2", made, make_groups(group, made.layout))
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    engine.generate([QUESTION], SamplingParams(max_new_tokens=4, ignore_eos=True))
    start = time.perf_counter()
    events = [(event.token_id, time.perf_counter() - start) for event in engine.stream([QUESTION], params)]
    stats = engine.stats()
    return {
        "tokens": [token for token, _ in events],
        "first_token_seconds": events[0][1],
        "tokens_per_second": (tokens - 1) / (events[-1][1] - events[0][1]),
        "load_seconds": stats.load_seconds,
        "weight_bytes": stats.weight_bytes,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "transport": group.transport,
    }


class TransformersPeer:
    """Transformers in this process; loaded once."""

    def __init__(self, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from shardwise.sharding.checkpoint.resolve import resolve

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        path = resolve("smollm2")
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        self.load_seconds = time.perf_counter() - start
        tokenizer = AutoTokenizer.from_pretrained(**source)
        self.prompt = tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def decode(self, tokens: int) -> dict:
        """Greedy decode; the time of the first token is that of a run of one token."""

        def run(count: int) -> tuple[list[int], float]:
            start = time.perf_counter()
            out = self.model.generate(**self.prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return out[0, self.prompt["input_ids"].shape[1] :].tolist(), time.perf_counter() - start

        _, first = run(1)
        ids, seconds = run(tokens)
        return {"tokens": ids, "first_token_seconds": first, "tokens_per_second": (tokens - 1) / (seconds - first)}


def run(tp: int, tokens: int, rounds: int) -> dict:
    import transformers

    from shardwise.launch.machine import machine_facts
    from shardwise.testing import run_processes

    program = f"{Path(__file__).stem}:"
    peer = TransformersPeer(tp)
    ours, theirs, rates = [], [], []
    for _ in range(rounds):
        rates.append(min(run_processes(tp, program + "stream_rate")))
        ranks = run_processes(tp, program + "decode", tp, tokens)
        ours.append({**ranks[0], "ranks": ranks})
        theirs.append(peer.decode(tokens))
        if any(rank["tokens"] != theirs[-1]["tokens"] for rank in ranks):
            raise SystemExit("Shardwise and Transformers generate different tokens: the rates mean nothing")
    fullest = max(rank["weight_bytes"] for rank in ours[0]["ranks"])
    result = {
        "machine": machine_facts() | {"load": os.getloadavg(), "transformers": transformers.__version__},
        "model": "SmolLM2-135M-Instruct, float32",
        "tp": tp,
        "tokens": tokens,
        "stream_gbps_per_rank": max(rates) / 1e9,
        "limit_tokens_per_second": max(rates) / fullest,
        "shardwise": _summary(ours),
        "transformers": {**_summary(theirs), "load_seconds": peer.load_seconds},
        "ranks": [{k: v for k, v in rank.items() if k != "tokens"} for rank in ours[-1]["ranks"]],
    }
    result["ratio"] = result["shardwise"]["median"] / result["transformers"]["median"]
    result["ratio_of_best"] = result["shardwise"]["best"] / result["transformers"]["best"]
    return result


def _summary(runs: list[dict]) -> dict:
    rates = [run["tokens_per_second"] for run in runs]
    return {
        "median": statistics.median(rates),
        "best": max(rates),
        "first_token_seconds": min(run["first_token_seconds"] for run in runs),
    }


def report(result: dict) -> str:
    ours, theirs, limit = result["shardwise"], result["transformers"], result["limit_tokens_per_second"]
    held = ", ".join(f"{rank['weight_bytes'] / 1e6:.0f}" for rank in result["ranks"])
    return "\n".join(
        [
            f"{result['model']}, greedy, {result['tokens']} tokens; {result['machine']['cpu']}",
            f"  one thread streams {result['stream_gbps_per_rank']:.1f} GB/s, ranks hold {held} MB",
            f"  {'':34}{'tok/s':>8}{'best':>8}{'of limit':>10}{'first token':>13}",
            f"  {'limit: weights once a token':34}{limit:8.1f}{'':8}{1:10.0%}",
            _row(f"shardwise, {result['tp']} ranks x 1 thread", ours, limit),
            _row(f"transformers, 1 x {result['tp']} threads", theirs, limit),
            f"  shardwise / transformers: {result['ratio']:.2f} (of the fastest rounds: {result['ratio_of_best']:.2f})",
        ]
    )


def _row(name: str, row: dict, limit: float) -> str:
    share, first = row["best"] / limit, f"{row['first_token_seconds']:.2f} s"
    return f"  {name:34}{row['median']:8.1f}{row['best']:8.1f}{share:10.0%}{first:>13}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cpu_decode.json")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    measured = run(options.tp, options.tokens, options.rounds)
    print(report(measured))
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(measured, indent=1) + "\n")
