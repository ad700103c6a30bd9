"""Loading speed: safetensors of a real shape onto one and two ranks, beside `cat` of the same files.

    python benchmarks/load_weights.py --gigabytes 16 --folder /dev/shm/weights

Writes random weights (only as many layers as fill that many gigabytes) into a folder of its own inside, unless that
holds them already, and removes it at the end. Each reading begins with the page cache in the same state: dropped where
the file system lets it go, else full, or full by `--cached`; the result says which.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shardwise.launch.machine import machine_facts
from shardwise.launch.start import run_job
from shardwise.sharding.plan import plan

HERE = Path(__file__).parent
FILE_BYTES = 4 << 30
"""As published checkpoints are split."""
BLOCK = 64 << 20
SAMPLE_SECONDS = 0.01


def write_checkpoint(shape: Path, folder: Path, gigabytes: float) -> int:
    """Config, index and files; the number of bytes of all tensors."""
    config = json.loads(shape.read_text())
    alone = plan(config)
    ends = sum(p.spec.nbytes for p in alone.loaded if p.layers is None)
    a_layer = (sum(p.spec.nbytes * p.count for p in alone.loaded) - ends) / config["num_hidden_layers"]
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - ends) / a_layer))
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    tensors = [(s.name, s.global_shape, s.dtype, s.nbytes) for s in plan(config).shards(0)]
    total = sum(nbytes for *_, nbytes in tensors)
    marker = folder / "model.safetensors.index.json"
    if marker.exists() and json.loads(marker.read_text())["metadata"]["total_size"] == total:
        return total
    shutil.rmtree(folder, ignore_errors=True)  # of another size
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    files: list[list[tuple]] = [[]]
    held = 0
    for tensor in tensors:
        if held and held + tensor[3] > FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(tensor)
        held += tensor[3]
    noise = np.random.default_rng(0).standard_normal(BLOCK // 4, dtype=np.float32).view(np.uint16)[1::2].tobytes()
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(lambda name, content: _write_file(folder / name, content, noise), names, files))
    weight_map = {tensor[0]: name for name, content in zip(names, files, strict=True) for tensor in content}
    marker.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def _write_file(path: Path, content: list[tuple], noise: bytes) -> None:
    header, at = {}, 0
    for name, shape, dtype, nbytes in content:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, nbytes in content:
            for start in range(0, nbytes, len(noise)):
                file.write(memoryview(noise)[: min(len(noise), nbytes - start)])
        os.fsync(file.fileno())


def drop_from_page_cache(files: list[Path]) -> float:
    """Ask for the files' pages to go; the share of them that stayed (all of them on tmpfs)."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return share_in_memory(files)


def share_in_memory(files: list[Path]) -> float:
    return float(np.concatenate([pages_in_memory(path) for path in files]).mean())


def pages_in_memory(path: Path) -> np.ndarray:
    """bool [pages] of a file that is not empty, by mincore(2). OSError where the system does not tell."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)
        resident = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        address, length, vector = map(ctypes.c_void_p, (content.ctypes.data, len(content), resident.ctypes.data))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, vector)
        del content  # else the mapping could not be closed
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, f"mincore: {os.strerror(code)}", str(path))
    return resident & 1 == 1


def time_cat(files: list[Path]) -> float:
    with open(os.devnull, "wb") as nowhere:
        begin = time.perf_counter()
        subprocess.run(["cat", *files], stdout=nowhere, check=True)
        return time.perf_counter() - begin


def load(context) -> dict:
    """A rank's body: its seconds from the first byte to a decoder, and its memory before, at most, and held."""
    from shardwise.comm.rank import use_groups
    from shardwise.comm.strategy import make_groups
    from shardwise.launch.session import choose_device
    from shardwise.parallel.engine import Engine
    from shardwise.sharding.layout import ParallelLayout

    payload = context.payload
    device = choose_device(payload["device"], context.info)
    made = plan(payload["folder"], ParallelLayout(context.info.world))
    if device != "cpu":
        import torch

        torch.zeros(1, device=device)  # a device's context takes time of its own
    world = context.communicator(device=device.split(":")[0])
    with use_groups(make_groups(world, made.layout)) as groups, _MemoryWatch() as memory, context.phase("load"):
        world.barrier()
        begin = time.perf_counter()
        engine = Engine(payload["folder"], made, groups, dtype="bfloat16", device=device)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        world.barrier()
    stats = engine.stats()
    world.close()
    return {
        "seconds": seconds,
        "shard_bytes": made.ranks[context.info.rank].weight_bytes,
        "weight_bytes": stats.weight_bytes,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "anonymous_before_bytes": memory.before,
        "peak_anonymous_bytes": memory.peak,
        "device": device,
    }


class _MemoryWatch:
    """Samples this process's memory less mapped files: before the block, and at most inside."""

    def __enter__(self) -> "_MemoryWatch":
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def measure(folder: Path, world: int, device: str) -> list[dict]:
    search = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    payload = {"folder": str(folder), "device": device}
    return run_job("load_weights:load", payload, world=world, environment={"PYTHONPATH": search})


def run(options: argparse.Namespace) -> dict:
    total = write_checkpoint(options.shape, options.folder, options.gigabytes)
    files = sorted(options.folder.glob("*.safetensors"))
    begin_with = share_in_memory if options.cached else drop_from_page_cache
    rounds: list[dict] = []
    result = {"shape": options.shape.stem, "bytes": total, "machine": machine_facts(), "rounds": rounds}
    if options.cached:
        time_cat(files)
    for number in range(options.rounds):
        resident = begin_with(files)
        seconds = time_cat(files)
        row: dict = {"resident_before": resident, "cat_seconds": seconds, "ranks": {}}
        rounds.append(row)
        print(
            f"round {number}: cat {seconds:.2f} s ({total / seconds / 1e9:.2f} GB/s), in memory before: {resident:.0%}"
        )
        for world in options.tp:
            begin_with(files)
            row["ranks"][world] = ranks = measure(options.folder, world, options.device)
            slowest = max(rank["seconds"] for rank in ranks)
            excess = max(rank["peak_rss_bytes"] - rank["shard_bytes"] for rank in ranks)
            print(
                f"  tp {world} ({ranks[0]['device'].split(':')[0]}): {slowest:6.2f} s = {slowest / seconds:.2f} x cat, "
                f"{total / slowest / 1e9:.2f} GB/s; peak host memory at most {excess / 1e9:+.2f} GB beside the shard, "
                f"{max(r['peak_anonymous_bytes'] - r['anonymous_before_bytes'] for r in ranks) / 1e9:.2f} GB of it "
                f"taken by loading (mapped files left out)",
                flush=True,
            )
            if options.json:
                options.json.parent.mkdir(exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Path, default=HERE / "shapes" / "llama-3.1-8b.json")
    parser.add_argument("--gigabytes", type=float, default=16.0)
    parser.add_argument("--folder", type=Path, required=True, help="where to make the folder of the files")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="read from the page cache: for disks slower than devices")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.folder = chosen.folder / f"shardwise-{chosen.shape.stem}"
    try:
        run(chosen)
    finally:
        if not chosen.keep:
            shutil.rmtree(chosen.folder, ignore_errors=True)
