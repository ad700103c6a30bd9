"""Reading ahead with several threads gives the tensors that reading piece by piece gives, in any order."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write

from shardwise.comm.rank import current_groups
from shardwise.parallel.engine import Engine
from shardwise.parallel.read_ahead import ReadAhead
from shardwise.parallel.sources import CheckpointSource, load_order
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

CPU = torch.device("cpu")
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=36, norm_topk_prob=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), "qwen3_moe", **MOE)


def ahead_of(source: CheckpointSource, order, **options) -> ReadAhead:
    return ReadAhead(source._reader, source._locate, order, CPU, **options)


def read_plainly(source: CheckpointSource, shard) -> torch.Tensor:
    out = torch.empty(tuple(sum(b - a for a, b in r) for r in shard.ranges), dtype=torch.float32)
    source.fill(out, shard, lambda count: None)
    return out


@pytest.mark.parametrize("window", [1, 50_000, 1 << 30])
@pytest.mark.parametrize("shuffled", [False, True])
def test_shards_come_whatever_the_order_and_the_window(folder, window, shuffled, monkeypatch):
    monkeypatch.setattr("shardwise.parallel.read_ahead.PIECE_BYTES", 1000)
    made = plan(folder, ParallelLayout(tp=2, moe_ep=2))
    source = CheckpointSource(open_checkpoint(folder), made, 1, CPU)
    shards = list(load_order(made, 1))
    ahead = ahead_of(source, shards, window=window)
    if shuffled:
        random.Random(0).shuffle(shards)
    with torch.inference_mode():  # as an engine loads
        for shard in shards:
            got = ahead.take(shard)
            assert torch.equal(got, read_plainly(source, shard)), shard.name
    assert ahead._ahead == 0 and not ahead._pending
    ahead.close()


def test_the_order_holds_every_shard_of_a_rank_once(folder):
    made = plan(folder, ParallelLayout(tp=3, moe_ep=3))
    for rank in range(3):
        names = [shard.name for shard in load_order(made, rank)]
        assert sorted(names) == sorted(shard.name for shard in made.shards(rank))


def test_no_more_is_read_ahead_than_the_window_and_one_shard(folder):
    made = plan(folder)
    source = CheckpointSource(open_checkpoint(folder), made, 0, CPU)
    shards = list(load_order(made, 0))
    ahead = ahead_of(source, shards, window=100_000)
    largest = max(shard.nbytes for shard in shards)
    for shard in shards:
        ahead.take(shard)
        assert ahead._ahead <= 100_000 + largest


def stored_as(folder, copy, dtype: torch.dtype):
    """A checkpoint with the matrices of another, in this type."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    tensors = {name: t.to(dtype) if t.dim() > 1 else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16], ids=str)
def test_values_are_those_that_the_bits_stand_for(folder, tmp_path, dtype):
    copy = stored_as(folder, tmp_path / "copy", dtype)
    made = plan(copy, ParallelLayout(tp=2))
    plain, ahead = (CheckpointSource(open_checkpoint(copy), made, 1, CPU, reads_ahead=reads) for reads in (False, True))
    for shard in load_order(made, 1):
        expected = read_plainly(plain, shard)
        assert torch.equal(read_plainly(ahead, shard), expected) and expected.abs().max() < 10, shard.name
    ahead.close()


def test_a_file_that_ends_early_is_named(folder, tmp_path):
    made, source_folder = plan(folder), tmp_path
    for file in folder.iterdir():
        (source_folder / file.name).write_bytes(file.read_bytes())
    source = CheckpointSource(open_checkpoint(source_folder), made, 0, CPU)
    _ = source.checkpoint.tensors  # headers are read while the file is whole
    weights = source_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    ahead = ahead_of(source, [])
    with pytest.raises(CheckpointError, match="model.safetensors: the file ends inside tensor"):
        for shard in made.shards(0):
            ahead.take(shard)


def test_a_load_that_fails_reads_no_more(folder, monkeypatch):
    readers = []

    def read_ahead(*args):
        readers.append(CheckpointSource(*args, reads_ahead=True))
        monkeypatch.delitem(readers[0].checkpoint.tensors, "model.norm.weight")
        return readers[0]

    monkeypatch.setattr("shardwise.parallel.weights.CheckpointSource", read_ahead)
    with pytest.raises(CheckpointError, match="model.norm.weight is missing"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))
    assert readers[0]._ahead._pool._shutdown and not readers[0]._ahead._pending


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_same_bytes_through_its_own_streams(folder, monkeypatch):
    monkeypatch.setattr("shardwise.parallel.read_ahead.PIECE_BYTES", 1000)
    made, device = plan(folder, ParallelLayout(tp=2, moe_ep=2)), torch.device("cuda")
    for rank in range(2):
        plain = CheckpointSource(open_checkpoint(folder), made, rank, CPU)
        ahead = CheckpointSource(open_checkpoint(folder), made, rank, device)
        for shard in load_order(made, rank):
            expected = read_plainly(plain, shard)
            got = torch.empty(expected.shape, device=device)
            ahead.fill(got, shard, lambda count: None)
            assert torch.equal(got.cpu(), expected), shard.name
        ahead.close()
