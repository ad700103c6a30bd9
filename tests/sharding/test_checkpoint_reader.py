import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import save_file

from shardwise.sharding.checkpoint import reader as reader_module
from shardwise.sharding.checkpoint.gguf_model import StoredTensor
from shardwise.sharding.checkpoint.header import TensorEntry
from shardwise.sharding.checkpoint.reader import Reader
from shardwise.sharding.checkpoint.safetensors import read_safetensors

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def read(stored: StoredTensor, ranges) -> np.ndarray:
    pieces = list(Reader().pieces(stored, ranges))
    assert [p[0][0] for p in pieces] == [0, *(p[0][1] for p in pieces)][: len(pieces)]
    return np.concatenate([array for _, array in pieces])


def quantised(path, dtype: str, shape) -> tuple[StoredTensor, np.ndarray]:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kind = GGMLQuantizationType[dtype]
    blocks = quants.quantize(values, kind)
    path.write_bytes(b"head" + blocks.tobytes())
    entry = TensorEntry("w", shape, dtype, path, 4, blocks.nbytes)
    return StoredTensor(entry), quants.dequantize(blocks, kind)


RANGES = [
    [[(0, 8)], [(0, 96)]],
    [[(2, 5)], [(0, 96)]],
    [[(0, 8)], [(32, 64)]],
    [[(1, 2), (5, 8)], [(3, 40), (70, 71)]],
]


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("ranges", RANGES)
def test_ranges_of_quantised_tensors_equal_the_whole_tensor_cut(tmp_path, monkeypatch, dtype, ranges):
    monkeypatch.setattr(reader_module, "PIECE_ELEMENTS", 200)
    stored, whole = quantised(tmp_path / "f", dtype, (8, 96))
    rows, columns = ([i for a, b in r for i in range(a, b)] for r in ranges)
    np.testing.assert_array_equal(read(stored, ranges), whole[np.ix_(rows, columns)])


@pytest.mark.parametrize("ranges", RANGES)
def test_ranges_of_plain_tensors_equal_the_whole_tensor_cut(tmp_path, ranges):
    whole = torch.randn(8, 96)
    save_file({"w": whole}, tmp_path / "m.safetensors")
    stored = StoredTensor(read_safetensors(tmp_path / "m.safetensors")["w"])
    rows, columns = ([i for a, b in r for i in range(a, b)] for r in ranges)
    np.testing.assert_array_equal(read(stored, ranges), whole.numpy()[np.ix_(rows, columns)])


def test_interleaved_head_rows_come_back_in_order(tmp_path):
    head, heads = 6, 4
    ordered = np.arange(head * heads, dtype=np.float32).repeat(2).reshape(-1, 2)
    stored_rows = ordered.reshape(heads, 2, head // 2, 2).swapaxes(1, 2).reshape(-1, 2)
    path = tmp_path / "f"
    path.write_bytes(stored_rows.tobytes())
    stored = StoredTensor(TensorEntry("q", (24, 2), "F32", path, 0, 192), head)
    np.testing.assert_array_equal(read(stored, [[(0, 24)], [(0, 2)]]), ordered)
    np.testing.assert_array_equal(
        read(stored, [[(6, 12), (20, 23)], [(1, 2)]]), ordered[[*range(6, 12), 20, 21, 22], 1:]
    )


def test_vectors_and_scalars_are_read(tmp_path):
    save_file({"v": torch.arange(5.0), "s": torch.tensor(2.0)}, tmp_path / "m.safetensors")
    entries = read_safetensors(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(read(StoredTensor(entries["v"]), [[(1, 2), (3, 5)]]), [1, 3, 4])
    np.testing.assert_array_equal(read(StoredTensor(entries["s"]), []), [2])
    stored, whole = quantised(tmp_path / "f", "Q8_0", (64,))
    np.testing.assert_array_equal(read(stored, [[(5, 40)]]), whole[5:40])


def test_no_piece_of_a_large_tensor_holds_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "PIECE_ELEMENTS", 1000)
    stored, whole = quantised(tmp_path / "f", "Q8_0", (64, 96))
    pieces = list(Reader().pieces(stored, [[(0, 64)], [(0, 96)]]))
    assert max(array.size for _, array in pieces) <= 1000
    np.testing.assert_array_equal(np.concatenate([array for _, array in pieces]), whole)
