"""Decoding SmolLM2 on the CPU with its weights in the file's own blocks, beside llama.cpp on the same file.

    python benchmarks/cpu_native_weights.py [--new-tokens 128] [--llama-python PYTHON] [--json FILE]

Prints tokens/s of two ranks with one thread each (weights native and dequantised) and of llama.cpp with two threads,
all greedy from the same prompt, in turn, medians of the rounds; and on the texts of `teacher_texts.py` the share of
positions at which native weights on two ranks predict the same next token as float32 (teacher forcing, one token a
step as in decoding). llama.cpp comes from the package llama-cpp-python of `--llama-python`, an interpreter that need
not have Shardwise; without it the row says so. Its build with OpenMP switched off (CMAKE_ARGS="-DGGML_OPENMP=OFF")
is what ran here.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LLAMA_CPP = "llama.cpp, 2 threads"
PROMPT = "Write a long story about a lighthouse keeper who finds a map."
RANKS = 2
FORMS = ("native", "dequantised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--skip-agreement", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-cpp-only", metavar="GGUF", help="print llama.cpp's speed as JSON and end")
    args = parser.parse_args()
    if args.llama_cpp_only:
        print(json.dumps(_llama_cpp(args.llama_cpp_only, args.new_tokens)))
        return
    from shardwise.launch.machine import machine_facts

    result = {"machine": machine_facts(), "rows": _rows(args)}
    for row in result["rows"]:
        speed = f"{row['tokens_per_second']:8.1f} tokens/s" if "tokens_per_second" in row else f"   {row['missing']}"
        print(f"{row['what']:48s}{speed}")
    if not args.skip_agreement:
        result["agreement"] = agreement = _agreement()
        print(
            f"next-token agreement of native weights with float32: {agreement['agree']:.2%} of "
            f"{agreement['positions']} positions "
            f"({agreement['plain']:.2%} in texts, {agreement['conversations']:.2%} in conversations)"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _rows(args: argparse.Namespace) -> list[dict]:
    rows: list[dict] = [{"what": f"shardwise, {RANKS} ranks x 1 thread, weights {form}", "all": []} for form in FORMS]
    peer = {"what": LLAMA_CPP, "all": []}
    for _ in range(args.rounds):
        for row, form in zip(rows, FORMS, strict=True):
            speed, row["weight_bytes"] = _ours(form, args.new_tokens)
            row["all"].append(speed)
        peer |= _llama_cpp_apart(args, peer["all"])
    for row in (*rows, peer):
        if row["all"]:
            row["tokens_per_second"] = statistics.median(row["all"])
    return [*rows, peer]


def _ours(form: str, new_tokens: int) -> tuple[float, list[int]]:
    """(tokens/s of the second answer, each rank's bytes of weights)"""
    from shardwise import LLM, SamplingParams

    with LLM("smollm2", tp=RANKS, weights=form) as llm:
        llm.generate([PROMPT], SamplingParams(max_new_tokens=8, ignore_eos=True))
        llm.generate([PROMPT], SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
        answer = llm.last_answer
        speed = (new_tokens - 1) / (answer.seconds - answer.time_to_first_token)
        return speed, [stats.weight_bytes for stats in llm.stats()]


def _llama_cpp_apart(args: argparse.Namespace, speeds: list[float]) -> dict:
    """One more round of llama.cpp, in a process of its own: its threads and torch's do not share one well."""
    from shardwise.sharding.checkpoint.resolve import resolve

    command = [args.llama_python, __file__, "--new-tokens", str(args.new_tokens)]
    done = subprocess.run(
        [*command, "--llama-cpp-only", str(resolve("smollm2"))], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        return {"missing": f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    answer = json.loads(done.stdout.splitlines()[-1])
    return {"all": [*speeds, answer.pop("tokens_per_second")], **answer}


def _llama_cpp(path: str, new_tokens: int) -> dict:
    import llama_cpp

    llama = llama_cpp.Llama(path, n_threads=2, n_threads_batch=2, n_ctx=1024, verbose=False)
    prompt = llama.tokenize(PROMPT.encode())
    for _ in range(2):  # the first answer warms up
        llama.reset()
        tokens = llama.generate(prompt, temp=0.0)
        next(tokens)
        started = time.perf_counter()
        for _ in range(new_tokens - 1):
            next(tokens)
        speed = (new_tokens - 1) / (time.perf_counter() - started)
    return {"tokens_per_second": speed, "version": llama_cpp.__version__}


def _agreement() -> dict:
    from shardwise.testing import run_threads

    exact = run_threads(1, _next_tokens, "dequantised", 1)[0]
    native = run_threads(RANKS, _next_tokens, "native", RANKS)[0]
    same = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(exact, native, strict=True)]
    from teacher_texts import PLAIN

    parts = {"agree": same, "plain": same[: len(PLAIN)], "conversations": same[len(PLAIN) :]}
    shares = {name: statistics.mean(x for text in texts for x in text) for name, texts in parts.items()}
    return {"positions": sum(map(len, same)), **shares}


def _next_tokens(form: str, tp: int) -> list[list[int]]:
    """The most likely next token after each position of each text, one token a step."""
    import torch
    from teacher_texts import CONVERSATIONS, PLAIN

    from shardwise.comm.rank import current_groups
    from shardwise.parallel.batch import Batch, Span
    from shardwise.parallel.cache import SlotCache
    from shardwise.parallel.engine import Engine
    from shardwise.sharding.plan import plan

    torch.set_num_threads(1)
    engine = Engine("smollm2", plan("smollm2", tp=tp), current_groups(), weights=form)
    texts = [*map(engine.tokenizer.encode, PLAIN), *map(engine.tokenizer.encode_chat, CONVERSATIONS)]
    cache = SlotCache(engine.cache_shapes, slots=1, max_length=512, dtype=engine.dtype, device=engine.device)
    step, head = engine.runner.token_step or engine.decoder.hidden, engine.decoder.head

    def best(place: int, token: int) -> int:
        return head.best(step(Batch([Span(0, place, 1)], [token], engine.device), cache))[0]

    with torch.inference_mode():
        return [[best(place, token) for place, token in enumerate(ids)] for ids in texts]


if __name__ == "__main__":
    main()
