import json

import pytest
import torch
from safetensors.torch import save_file

from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.safetensors import INDEX, read_safetensors, read_safetensors_folder


def raw(header: dict | str, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def field(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_agrees_with_the_safetensors_package(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    entries = read_safetensors(path)
    assert {n: e.shape for n, e in entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    entry, content = entries["a"], path.read_bytes()
    assert content[entry.offset : entry.offset + entry.nbytes] == tensors["a"].numpy().tobytes()


DAMAGED = {
    "too short": (b"abc", "too short"),
    "header larger than the file": (raw({})[:-1], "truncated"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "to fetch the file: git lfs pull"),
    "header length of 10 GB": ((10 << 30).to_bytes(8, "little") + b"{}", "exceeds the format's limit"),
    "not JSON": (raw("{nope"), "header is not JSON"),
    "nested too deeply": (raw("[" * 100000), "header is not JSON"),
    "a list": (raw("[]"), "a JSON list"),
    "tensor twice": (raw('{"a": 1, "a": 2}'), "a occurs twice"),
    "field missing": (raw({"a": {"dtype": "F32"}}), "tensor a is"),
    "fields of the wrong kind": (raw({"a": field(dtype=["F32"])}, bytes(8)), "tensor a is"),
    "negative size": (raw({"a": field(shape=(-2,))}, bytes(8)), "tensor a is"),
    "unknown dtype": (raw({"a": field(dtype="F7")}, bytes(8)), "tensor a: unknown dtype 'F7'"),
    "size that does not fit the shape": (raw({"a": field(shape=(3,))}, bytes(8)), "tensor a: F32 [3] takes 12 bytes"),
    "data cut off": (raw({"a": field()}, bytes(7)), "truncated"),
    "offset beyond the file": (raw({"a": field(offsets=(1 << 40, (1 << 40) + 8))}, bytes(8)), "truncated"),
    "overlap": (raw({"a": field(), "b": field(offsets=(4, 12))}, bytes(12)), "inside tensor a"),
    "hole": (raw({"a": field(), "b": field(offsets=(12, 20))}, bytes(20)), "holes or trailing data"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_give_one_error_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_safetensors(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")

    def index(weight_map) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    index({"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path, index


def test_an_index_joins_its_shards(sharded):
    folder, _ = sharded
    tensors = read_safetensors_folder(folder)
    assert {name: entry.path.name for name, entry in tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_what_an_index_forgets_of_its_shards_is_read_too(sharded):
    folder, index = sharded
    save_file({"b": torch.zeros(3), "c": torch.zeros(4)}, folder / "two.safetensors")
    index({"b": "two.safetensors"})
    assert {name: entry.shape for name, entry in read_safetensors_folder(folder).items()} == {"b": (3,), "c": (4,)}


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", 7, None, [], {}]
)
def test_an_index_may_not_point_outside_of_its_folder(sharded, file):
    folder, index = sharded
    index({"a": file})
    with pytest.raises(CheckpointError, match="beside the index"):
        read_safetensors_folder(folder)


def test_an_index_that_names_a_missing_shard_or_tensor_is_refused(sharded):
    folder, index = sharded
    index({"a": "three.safetensors"})
    with pytest.raises(CheckpointError, match="three.safetensors, the shard of a, is missing"):
        read_safetensors_folder(folder)
    index({"a": "two.safetensors"})
    with pytest.raises(CheckpointError, match="tensor a should be in two.safetensors"):
        read_safetensors_folder(folder)


def test_files_without_an_index_may_not_share_a_tensor(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="tensor a is in two files"):
        read_safetensors_folder(tmp_path)


def test_pickle_files_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle file"):
        read_safetensors_folder(tmp_path)


def test_90000_tensors_in_160_shards_are_read_quickly(tmp_path):
    import time

    weight_map, shards, each = {}, 160, 563
    for shard in range(shards):
        names = [f"model.layers.{shard}.mlp.experts.{i}.gate_proj.weight" for i in range(each)]
        header = {n: field(shape=(1,), offsets=(4 * i, 4 * i + 4)) for i, n in enumerate(names)}
        (tmp_path / f"{shard}.safetensors").write_bytes(raw(header, bytes(4 * each)))
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    started = time.process_time()
    assert len(read_safetensors_folder(tmp_path)) == shards * each
    assert time.process_time() - started < 5  # 0.4 s alone on one core; loose, as caches are shared with other tests
