"""Decoding SmolLM2 on the CPU with its weights in the file's own blocks, beside llama.cpp on the same file.

    python benchmarks/cpu_native_weights.py [--new-tokens 128] [--json FILE]

Prints tokens/s of two ranks with one thread each (weights native and dequantised) and of llama.cpp with two threads,
all greedy from the same prompt, medians of the repetitions, and the next-token agreement of native weights with
float32 under teacher forcing. llama.cpp comes from the package llama-cpp-python; without it the row says so.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

LLAMA_CPP = "llama.cpp, 2 threads"
PROMPT = "Write a long story about a lighthouse keeper who finds a map."
TEXT = (
    "The river had been rising since dawn, and by noon the lower road was under water. Mara counted the sandbags "
    "again. There were forty-one, which was not enough, and the truck would not come back before dark. She "
    "thought of the mill, of its wheel turning backwards in the flood, and of the old man who had refused to "
    "leave it. Somebody would have to go. The dog lifted its head, as if it had heard her think, and then the "
    "lights went out along the whole valley. In the kitchen the radio kept talking on its batteries about a "
    "bridge that had closed, and about schools. She took the lamp from its hook, filled it, and wrote three lines"
    " on the back of an envelope, which she left beside the bread."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-cpp-only", action="store_true", help="print llama.cpp's row as JSON and end")
    args = parser.parse_args()
    if args.llama_cpp_only:
        print(json.dumps(_llama_cpp(args)))
        return
    rows = [_ours(form, args) for form in ("native", "dequantised")]
    rows.append(_llama_cpp_apart(sys.argv[1:]))
    agreement = _agreement()
    for row in rows:
        speed = f"{row['tokens_per_second']:8.1f} tokens/s" if "tokens_per_second" in row else f"   {row['missing']}"
        print(f"{row['what']:48s}{speed}")
    print(
        f"next-token agreement of native weights with float32: {agreement['agree']:.2%} of {agreement['tokens']} tokens"
    )
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows, "agreement": agreement}, indent=1) + "\n")


def _ours(form: str, args: argparse.Namespace) -> dict:
    from shardwise import LLM, SamplingParams

    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    speeds = []
    with LLM("smollm2", tp=2, weights=form) as llm:
        for _ in range(args.repeat):
            llm.generate([PROMPT], params)
            answer = llm.last_answer
            speeds.append((args.new_tokens - 1) / (answer.seconds - answer.time_to_first_token))
        held = [stats.weight_bytes for stats in llm.stats()]
    what = f"shardwise, 2 ranks x 1 thread, weights {form}"
    return {"what": what, "tokens_per_second": statistics.median(speeds), "all": speeds, "weight_bytes": held}


def _llama_cpp_apart(arguments: list[str]) -> dict:
    """llama.cpp's row from a process of its own: its threads and torch's do not share one well."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--llama-cpp-only"], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        return {"what": LLAMA_CPP, "missing": f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _llama_cpp(args: argparse.Namespace) -> dict:
    if importlib.util.find_spec("llama_cpp") is None:
        return {"what": LLAMA_CPP, "missing": "llama-cpp-python is not installed"}
    from llama_cpp import Llama

    from shardwise.sharding.checkpoint.resolve import resolve

    llama = Llama(str(resolve("smollm2")), n_threads=2, n_threads_batch=2, n_ctx=1024, verbose=False)
    prompt = llama.tokenize(PROMPT.encode())
    speeds = []
    for _ in range(args.repeat):
        llama.reset()
        tokens = llama.generate(prompt, temp=0.0)
        next(tokens)
        started = time.perf_counter()
        for _ in range(args.new_tokens - 1):
            next(tokens)
        speeds.append((args.new_tokens - 1) / (time.perf_counter() - started))
    return {"what": LLAMA_CPP, "tokens_per_second": statistics.median(speeds), "all": speeds}


def _agreement() -> dict:
    from shardwise.testing import run_threads

    [(ids, exact)] = run_threads(1, _next_tokens, "dequantised")
    [(_, native)] = run_threads(1, _next_tokens, "native")
    return {"tokens": len(ids), "agree": (exact == native).float().mean().item()}


def _next_tokens(form: str):
    """(token ids of the text, the most likely next token after each), one token a step as in decoding."""
    import torch

    from shardwise.comm.rank import current_groups
    from shardwise.parallel.batch import Batch, Span
    from shardwise.parallel.cache import SlotCache
    from shardwise.parallel.engine import Engine
    from shardwise.sharding.plan import plan

    engine = Engine("smollm2", plan("smollm2"), current_groups(), weights=form)
    ids = engine.tokenizer.encode(TEXT)
    cache = SlotCache(engine._cache_shapes, slots=1, max_length=512, dtype=engine.dtype, device=engine.device)
    with torch.inference_mode():
        rows = [engine._decoder(Batch([Span(0, i, 1)], [t], engine.device), cache) for i, t in enumerate(ids)]
    return ids, torch.cat(rows).argmax(-1)


if __name__ == "__main__":
    main()
