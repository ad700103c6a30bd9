import errno
import hashlib
import json
import os
import struct

import numpy as np
import pytest

from shardwise.sharding.checkpoint import copying
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.merge import merge_shards
from shardwise.sharding.checkpoint.per_rank import JOURNAL, PARTIAL, REST, file_name, read_header
from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.checkpoint.shard import write_shards
from shardwise.sharding.plan import plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 101,
    "torch_dtype": "bfloat16",
}


def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def model(tmp_path):
    """A Llama folder in two files, with one tensor that no rank loads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    planned = plan(CONFIG)
    tensors = {s.name: rng.integers(0, 65536, s.global_shape, dtype=np.uint16) for s in planned.shards(0)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = rng.integers(0, 65536, (8,), dtype=np.uint16)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, chosen in files.items():
        write_safetensors(folder / file, {n: tensors[n] for n in chosen})
    index = {"metadata": {}, "weight_map": {n: f for f, chosen in files.items() for n in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, tensors


def digests(folder, pattern="*.safetensors"):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(pattern)}


@pytest.mark.parametrize("options", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 5}, {"tp": 2, "pad": ["vocab"]}], ids=str)
def test_merging_gives_back_the_original_files_bit_for_bit(options, model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), **options), open_checkpoint(folder), tmp_path / "out")
    merge_shards(tmp_path / "out", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(folder)


def test_a_tensor_that_the_index_forgets_survives_too(model, tmp_path):
    folder, _ = model
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"]
    path.write_text(json.dumps(index))
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    merge_shards(tmp_path / "out", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(folder)


def test_a_ranks_file_holds_exactly_what_the_plan_says(model, tmp_path):
    folder, tensors = model
    planned = plan(str(folder), tp=2)
    write_shards(planned, open_checkpoint(folder), tmp_path / "out")
    for rank in range(2):
        path = tmp_path / "out" / file_name(rank, 2)
        held, _, _ = read_header(path)
        assert sorted(held) == sorted(s.name for s in planned.shards(rank))
        layers = [int(name.split(".")[2]) for name in held if ".layers." in name]
        assert layers == sorted(layers)
        assert sum(t.nbytes for t in held.values()) == planned.ranks[rank].weight_bytes
        data = path.read_bytes()
        for shard in planned.shards(rank):
            index = np.ix_(*(np.concatenate([np.arange(a, b) for a, b in dim]) for dim in shard.ranges))
            stored = np.frombuffer(data, np.uint16, held[shard.name].nbytes // 2, held[shard.name].offset)
            assert np.array_equal(stored.reshape(shard.local_shape), tensors[shard.name][index])
    rest, _, _ = read_header(tmp_path / "out" / REST)
    assert list(rest) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_interrupted_job_goes_on_and_leaves_nothing_behind(model, tmp_path, monkeypatch):
    folder, _ = model
    out, planned, source = tmp_path / "out", plan(str(folder), tp=2), open_checkpoint(folder)
    monkeypatch.setattr("shardwise.sharding.checkpoint.shard.SYNC_BYTES", 1)

    def stop_half_way(written, total):
        if written > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(planned, source, out, progress=stop_half_way)
    noted = json.loads((out / JOURNAL).read_text())["tensors"]
    assert 0 < noted < 20 and not (out / file_name(0, 2)).exists()
    copied = []

    def copy_and_note(descriptor, entry, *where):
        copied.append(entry.name)
        copying.copy_part(descriptor, entry, *where)

    monkeypatch.setattr("shardwise.sharding.checkpoint.shard.copy_part", copy_and_note)
    write_shards(planned, source, out)
    assert len(set(copied)) == len(source.tensors) - noted
    assert not list(out.glob("*" + PARTIAL)) and not (out / JOURNAL).exists()
    merge_shards(out, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(folder)


def test_another_plans_files_are_not_overwritten(model, tmp_path):
    folder, _ = model
    source = open_checkpoint(folder)
    write_shards(plan(str(folder), tp=2), source, tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(CheckpointError, match="another plan"):
        write_shards(plan(str(folder), tp=3), source, tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_reads_and_writes_that_the_system_cuts_short_are_completed(model, tmp_path, monkeypatch):
    """As Linux does beyond 2 GiB, and where a disk is nearly full."""
    folder, _ = model
    write, read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, memoryview(data).cast("B")[:7], offset))
    monkeypatch.setattr(os, "pread", lambda file, count, offset: read(file, min(count, 7), offset))
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    merge_shards(tmp_path / "out", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(folder)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_tensor_is_joined_a_few_rows_at_a_time(rows, model, tmp_path, monkeypatch):
    folder, _ = model
    write_shards(plan(str(folder), tp=3), open_checkpoint(folder), tmp_path / "out")
    monkeypatch.setattr("shardwise.sharding.checkpoint.merge.CHUNK_BYTES", rows * 96 * 2)
    merge_shards(tmp_path / "out", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(folder)


def test_a_full_disk_is_told_with_the_folder(model, tmp_path, monkeypatch):
    folder, _ = model
    source, planned = open_checkpoint(folder), plan(str(folder), tp=2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left") as failed:
        patched.setattr(os, "pwrite", full)
        write_shards(planned, source, tmp_path / "out")
    assert failed.value.filename == str(tmp_path / "out")
    write_shards(planned, source, tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left") as failed:
        patched.setattr(os, "fdatasync", full)
        merge_shards(tmp_path / "out", tmp_path / "back")
    assert failed.value.filename == str(tmp_path / "back")


def test_a_rank_file_that_ends_early_is_named(model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    path = tmp_path / "out" / file_name(1, 2)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="rank-00001-of-00002.safetensors: .*truncated"):
        merge_shards(tmp_path / "out", tmp_path / "back")


def test_rank_files_are_merged_before_they_are_cut_anew(model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    with pytest.raises(CheckpointError, match="--merge"):
        write_shards(plan(str(tmp_path / "out"), tp=3), open_checkpoint(tmp_path / "out"), tmp_path / "other")


def test_a_missing_rank_file_is_named_by_count(model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    (tmp_path / "out" / file_name(1, 2)).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 rank files"):
        merge_shards(tmp_path / "out", tmp_path / "back")


def test_a_source_file_without_headers_is_named(model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    (tmp_path / "out" / "source.json").write_text('{"model.safetensors": 5}')
    with pytest.raises(CheckpointError, match="source.json: expected an object of file names and the texts of their"):
        merge_shards(tmp_path / "out", tmp_path / "back")


def test_the_models_own_folder_is_no_target(model):
    folder, _ = model
    with pytest.raises(CheckpointError, match="own folder"):
        write_shards(plan(str(folder), tp=2), open_checkpoint(folder), folder)


def test_a_merged_folder_has_the_models_small_files_again(model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    merge_shards(tmp_path / "out", tmp_path / "back")
    assert digests(tmp_path / "back", "*") == digests(folder, "*")


def test_merging_into_the_rank_files_or_a_file_is_refused(model, tmp_path):
    folder, _ = model
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), tmp_path / "out")
    before = digests(tmp_path / "out", "*")
    with pytest.raises(CheckpointError, match="holds the rank files themselves"):
        merge_shards(tmp_path / "out", tmp_path / "out")
    assert digests(tmp_path / "out", "*") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        merge_shards(tmp_path / "out", tmp_path / "file")
