"""Hugging Face Transformers generating with random weights of a shape: what `bench generate` stands beside.

    python benchmarks/generate_peers.py --shape benchmarks/shapes/llama-3.1-8b.json --json FILE

Two settings, each in a process of its own with a time limit: `generate` as it comes, and with a static cache, which
makes Transformers compile its decode step into CUDA graphs. The faster one is the peer.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from shardwise.launch.machine import machine_facts

SETTINGS = {"dynamic": {}, "static": {"cache_implementation": "static"}}
RUNS = 3


def load_model(shape: Path, device: str, dtype: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(shape.read_text())
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def measure(options: argparse.Namespace) -> dict:
    """Decode rate: what more tokens cost than the first alone, the best of several runs."""
    import torch

    begin = time.perf_counter()
    model = load_model(options.shape, options.device, options.dtype)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (options.batch, options.input), generator=generator)
    prompt = prompt.to(options.device)
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None

    def seconds(count: int) -> float:
        wait()
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            **SETTINGS[options.setting],
        )
        wait()
        assert out.shape[1] == options.input + count
        return time.perf_counter() - start

    seconds(options.output)
    seconds(1)
    ready = time.perf_counter() - begin
    first = min(seconds(1) for _ in range(RUNS))
    whole = [seconds(options.output) for _ in range(RUNS)]
    later = options.batch * (options.output - 1)
    return {
        "decode_tokens_per_second": later / (min(whole) - first),
        "tokens_per_second": options.batch * options.output / min(whole),
        "first_token_seconds": first,
        "seconds": whole,
        "ready_after_seconds": ready,
    }


def run(options: argparse.Namespace) -> dict:
    import transformers

    found: dict[str, dict] = {}
    for setting in SETTINGS:
        words = [
            f"--{name}={getattr(options, name)}" for name in ("shape", "device", "dtype", "batch", "input", "output")
        ]
        command = [sys.executable, __file__, *words, f"--setting={setting}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
            lines = done.stdout.strip().splitlines() or [""]
            found[setting] = json.loads(lines[-1]) if done.returncode == 0 else {"error": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            found[setting] = {"error": f"not done within {options.limit:g} s"}
        row = found[setting]
        print(f"{setting:8} " + (row.get("error", "").strip().splitlines() or [_line(row)])[-1], flush=True)
        result = {
            "peer": f"transformers {transformers.__version__}",
            "shape": options.shape.stem,
            "load": {name: getattr(options, name) for name in ("batch", "input", "output", "dtype")},
            "machine": machine_facts(),
            "settings": found,
        }
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _line(row: dict) -> str:
    first = row["first_token_seconds"] * 1e3
    return (
        f"decode {row['decode_tokens_per_second']:8.1f} tokens/s, first token {first:.1f} ms, "
        f"ready after {row['ready_after_seconds']:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Path, default=Path(__file__).parent / "shapes" / "llama-3.1-8b.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument(
        "--limit", type=float, default=75.0, help="seconds for a setting, loading and compiling included"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(measure(chosen)))
    else:
        run(chosen)
