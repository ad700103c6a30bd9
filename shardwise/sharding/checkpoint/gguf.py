"""GGUF headers: metadata and tensor table of one file, read lazily. Free of torch, numpy and the gguf package.

Layout (GGUF specification, versions 2 and 3, little-endian): magic, version, tensor count, metadata count, metadata
pairs, tensor table, padding to `general.alignment`, tensor data. Arrays (a vocabulary has 50,000 strings) are only
stepped over; `GgufFile.metadata[key]` decodes one when it is asked for.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardwise.sharding.checkpoint.header import CheckpointError, TensorEntry, check_ranges, stored_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

TYPES = {
    **dict(enumerate(["F32", "F16", "Q4_0", "Q4_1"])),
    **dict(enumerate(["Q5_0", "Q5_1", "Q8_0"], 6)),
    **dict(enumerate(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"], 10)),
    **dict(enumerate(["IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"], 16)),
    **dict(enumerate(["I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"], 24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""Tensor type numbers of ggml."""

_SCALARS = {number: struct.Struct("<" + code) for number, code in enumerate("BbHhIif?")}
_SCALARS |= {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


class _Value(NamedTuple):
    """A metadata value that was stepped over: its type and where it begins."""

    kind: int
    position: int


class _Metadata(Mapping):
    """Metadata pairs in file order; values are decoded at every access, so keep what is used often."""

    def __init__(self, reader: "_Reader", values: dict[str, _Value]):
        self._reader, self._values = reader, values

    def __getitem__(self, key: str) -> Any:
        kind, position = self._values[key]
        self._reader.field, self._reader.position = f"metadata {key}", position
        return self._reader.value(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GgufFile(NamedTuple):
    """The header of one GGUF file; the mapping of the file stays open as long as `metadata` lives."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: dict[str, TensorEntry]
    """In file order, with shapes slowest dimension first (the file stores them the other way round)."""


def read_gguf(path: str | Path) -> GgufFile:
    """Header of the GGUF file `path`.

    CheckpointError for a wrong magic, an unknown version or type, a truncated file, counts or lengths that exceed the
    file, duplicate names, and tensor ranges that overlap or lie outside. OSError when the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(4)
        if head != MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file: it begins with {head!r}, expected {MAGIC!r}")
        reader = _Reader(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    reader.position = len(MAGIC)
    version = _read_version(reader)
    tensor_count, pair_count = reader.count("tensor count", 24), reader.count("metadata count", 13)
    metadata = _Metadata(reader, _index_metadata(reader, pair_count))
    rows = [_tensor_row(reader, i) for i in range(tensor_count)]
    end_of_header = reader.position
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a power of two")
    data = -(-end_of_header // alignment) * alignment
    tensors = _entries(reader, rows, data, alignment)
    check_ranges(tensors.values(), data, reader.size)
    return GgufFile(path, version, metadata, tensors)


def _read_version(reader: "_Reader") -> int:
    reader.field = "version"
    version = reader.number(_U32)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = " (a big-endian file)" if swapped in VERSIONS else ""
        raise CheckpointError(f"{reader.path}: GGUF version {version}{hint}, this reader knows {VERSIONS}")
    return version


def _index_metadata(reader: "_Reader", count: int) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for index in range(count):
        reader.field = f"key of metadata pair {index}"
        key = reader.string()
        reader.field = f"metadata {key}"
        if key in values:
            raise reader.error("the key occurs twice")
        kind = reader.number(_U32)
        values[key] = _Value(kind, reader.position)
        reader.skip(kind)
    return values


def _tensor_row(reader: "_Reader", index: int) -> tuple[str, tuple[int, ...], str, int]:
    reader.field = f"name of tensor {index}"
    name = reader.string()
    reader.field = f"tensor {name}"
    dims = reader.number(_U32)
    if not 1 <= dims <= MAX_DIMS:
        raise reader.error(f"{dims} dimensions, expected 1 to {MAX_DIMS}")
    shape = tuple(reader.number(_U64) for _ in range(dims))[::-1]
    number = reader.number(_U32)
    if number not in TYPES:
        raise reader.error(f"unknown type {number}, known: {', '.join(f'{n} {t}' for n, t in TYPES.items())}")
    return name, shape, TYPES[number], reader.number(_U64)


def _entries(reader: "_Reader", rows, data: int, alignment: int) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for name, shape, dtype, offset in rows:
        reader.field = f"tensor {name}"
        if name in tensors:
            raise reader.error("the name occurs twice")
        if offset % alignment:
            raise reader.error(f"offset {offset} is not a multiple of the alignment {alignment}")
        try:
            nbytes = stored_bytes(shape, dtype)
        except ValueError as error:
            raise reader.error(str(error)) from None
        tensors[name] = TensorEntry(name, shape, dtype, reader.path, data + offset, nbytes)
    return tensors


class _Reader:
    """A cursor over the mapped file; every read is checked against its end and errors name the current field."""

    def __init__(self, path: Path, buffer: mmap.mmap):
        self.path, self.buffer, self.size = path, buffer, len(buffer)
        self.position = 0
        self.field = "header"

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.field}: {text}")

    def _truncated(self, wanted: int) -> CheckpointError:
        return self.error(
            f"{wanted} bytes wanted at byte {self.position}, but the file has {self.size}: truncated or corrupt, "
            "fetch it again"
        )

    def number(self, form: struct.Struct) -> Any:
        if self.position + form.size > self.size:
            raise self._truncated(form.size)
        value = form.unpack_from(self.buffer, self.position)[0]
        self.position += form.size
        return value

    def count(self, field: str, least_bytes: int) -> int:
        """A number of records of at least `least_bytes` each, which must fit the rest of the file."""
        self.field = field
        value = self.number(_U64)
        if value * least_bytes > self.size - self.position:
            raise self.error(
                f"{value} entries cannot fit a file of {self.size} bytes: truncated or corrupt, fetch it again"
            )
        return value

    def string(self) -> str:
        length = self.number(_U64)
        if length > self.size - self.position:
            raise self._truncated(length)
        start, self.position = self.position, self.position + length
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error}") from None

    def array_head(self) -> tuple[int, int]:
        kind, length = self.number(_U32), self.number(_U64)
        if kind == _ARRAY:
            raise self.error("an array of arrays, which no known writer makes")
        least = _SCALARS[kind].size if kind in _SCALARS else 8
        if length * least > self.size - self.position:
            raise self._truncated(length * least)
        return kind, length

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return self.number(self._scalar(kind))

    def _array(self) -> list:
        kind, length = self.array_head()
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(length)]
        form = struct.Struct(f"<{length}{_SCALARS[kind].format[1:]}")
        start, self.position = self.position, self.position + form.size
        return list(form.unpack_from(self.buffer, start))

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            self._skip_strings(1)
        elif kind == _ARRAY:
            self._skip_array()
        else:
            self.number(self._scalar(kind))

    def _skip_array(self) -> None:
        kind, length = self.array_head()
        if kind == _STRING:
            self._skip_strings(length)
        else:
            self.position += length * self._scalar(kind).size

    def _skip_strings(self, count: int) -> None:
        # The one loop that runs 100,000 times on a real file: locals, and one bound check by the unpacker itself.
        position, buffer, unpack = self.position, self.buffer, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
        except (struct.error, OverflowError):  # the latter where lengths add up to more than an index can be
            self.position = min(position, self.size)
            raise self._truncated(8) from None
        if position > self.size:
            raise self._truncated(position - self.position)
        self.position = position

    def _scalar(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise self.error(f"unknown metadata type {kind}, known: 0 to 12")
        return _SCALARS[kind]
