"""The planner's figures: time and memory from the shell, headers of a large folder, and writing shards beside `cp`.

    python benchmarks/planner.py CONFIG.json [--gigabytes 2] [--folder DIR] [--json FILE]

CONFIG.json is a published config (DeepSeek-V3, Kimi-K2, ...). Commands run five times, medians are shown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
LAYER_BYTES = 436_224_000
REPEAT = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint that is sharded")
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows = [
            {"what": "shardwise --help", **_command(["--help"])},
            {
                "what": f"plan {args.config.stem} --tp 8 --ep 8",
                **_command(["plan", args.config, "--tp", "8", "--ep", "8"]),
            },
            {
                "what": f"plan {args.config.stem} --search --gpus 8",
                **_command(["plan", args.config, "--search", "--gpus", "8"]),
            },
            _headers(folder / "many"),
            *_shards(folder, args.gigabytes),
        ]
    for row in rows:
        figures = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if k != "what")
        print(f"{row['what']:60s} {figures}")
    if args.json:
        from shardwise.launch.machine import machine_facts

        machine = machine_facts() | {"load": os.getloadavg()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _command(arguments: list) -> dict:
    """Wall seconds and peak memory of the command line, median of REPEAT runs."""
    seconds, peaks = [], []
    for _ in range(REPEAT):
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "shardwise", *map(str, arguments)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds.append(time.perf_counter() - started)
        peaks.append(usage.ru_maxrss / 1024)
        assert os.waitstatus_to_exitcode(status) == 0, arguments
    return {"seconds": statistics.median(seconds), "peak_mib": statistics.median(peaks)}


def _headers(folder: Path) -> dict:
    """Reading the headers of 160 files with 90,000 tensors (of no data: zero columns)."""
    from shardwise.sharding.checkpoint.safetensors import read_safetensors_folder

    folder.mkdir()
    files, names = 160, [f"model.layers.{i // 1500}.mlp.experts.{i % 1500}.weight" for i in range(90_000)]
    where = {}
    for number in range(files):
        chosen = names[number::files]
        header = {n: {"dtype": "BF16", "shape": [2048, 0], "data_offsets": [0, 0]} for n in chosen}
        text = json.dumps(header).encode()
        file = f"model-{number:05d}-of-{files:05d}.safetensors"
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        where |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    times = []
    for _ in range(REPEAT):
        started = time.perf_counter()
        assert len(read_safetensors_folder(folder)) == len(names)
        times.append(time.perf_counter() - started)
    return {"what": "headers of 160 files, 90,000 tensors", "seconds": statistics.median(times)}


def _shards(folder: Path, gigabytes: float) -> list[dict]:
    """`cp -r` and `shardwise shard` (a process each, synced) of the same random checkpoint."""
    source = folder / "model"
    size = _write_checkpoint(source, max(1, round(gigabytes * 1e9 / LAYER_BYTES)))
    rows = []
    for what, command in (
        ("cp", ["cp", "-r", source, folder / "copy"]),
        ("shard --tp 4", [sys.executable, "-m", "shardwise", "shard", source, "--tp", "4", "--out", folder / "out"]),
        (
            "shard --merge",
            [sys.executable, "-m", "shardwise", "shard", folder / "out", "--merge", "--out", folder / "back"],
        ),
    ):
        os.sync()
        started = time.perf_counter()
        child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        os.sync()
        seconds = time.perf_counter() - started
        assert os.waitstatus_to_exitcode(status) == 0, command
        rows.append(
            {
                "what": f"{what}, {size / 1e9:.1f} GB",
                "gb_per_second": size / 1e9 / seconds,
                "peak_mib": usage.ru_maxrss / 1024,
            }
        )
        if what == "cp":
            shutil.rmtree(folder / "copy")
    for file in source.glob("*.safetensors"):
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes(), file
    return rows


def _write_checkpoint(folder: Path, layers: int) -> int:
    """A Llama of random bytes, one file a layer; returns its bytes."""
    from shardwise.sharding.plan import plan

    folder.mkdir()
    config = {**LLAMA, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    files: dict[str, list] = {}
    for shard in plan(config).shards(0):
        key = shard.name.split(".")[2] if ".layers." in shard.name else "ends"
        files.setdefault(key, []).append(shard)
    block, total = os.urandom(1 << 24), 0
    for key, shards in files.items():
        header, end = {}, 0
        for s in shards:
            header[s.name] = {"dtype": s.dtype, "shape": s.global_shape, "data_offsets": [end, end := end + s.nbytes]}
        text = json.dumps(header).encode()
        with (folder / f"model-{key}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, len(block)):
                file.write(block[: end - start])
        total += end
    return total


if __name__ == "__main__":
    main()
