"""Random weights in the place of a checkpoint's: any rank, any layout and any device draw the same model.

An element is a hash of the seed, its tensor's name and its index in the whole tensor, so a shard needs nobody else.
The hash is lowbias32 (Wellons, "Prospecting for hash functions") on the row and then on the column.
"""

import zlib
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from shardwise.parallel.sources import OnBytes
from shardwise.parallel.storage import EXPONENTS
from shardwise.sharding.axes import Range
from shardwise.sharding.checkpoint.reader import NUMPY
from shardwise.sharding.shards import TensorShard

STD = 0.02
"""Of weights, as models are initialised with; norms turn any scale of activations back to 1."""
CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Elements drawn at once: what a core's cache holds, or 1 GiB of temporaries."""
LEAST_COLUMNS = 1024
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
MXFP4_SCALE = 119
"""Or one more: biased exponents with which codes of -6 to 6 deviate by 0.01 to 0.02."""
_CONSTANTS = {("zeros", "I32"): -0x77777778, ("zeros", "I8"): 0, ("group_index", "I32"): -1, ("shape", "I64"): 0}
"""By part and storage type: zero points in the middle of the codes, groups in order, a shape that nobody reads."""
_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_COLUMN = 0x9E3779B1


class RandomSource:
    """Fills shards with values that a forward pass stays finite with, whatever their storage type."""

    def __init__(self, seed: int):
        self._seed = seed

    def fill(self, out: Tensor, shard: TensorShard, on_bytes: OnBytes) -> None:
        """Uniform around the role's centre; random bits for packed weights. ValueError for types that have no draw."""
        self.fill_stack(out.unsqueeze(0), [shard], on_bytes)

    def fill_stack(self, out: Tensor, shards: Sequence[TensorShard], on_bytes: OnBytes) -> None:
        alike = shards[0]
        ranges, shape = alike.ranges or (((0, 1),),), alike.global_shape or (1,)
        draw, split = _draw_of(alike), _first_column_dim(shape)
        rows = _places(ranges[:split], shape[:split], out.device)
        columns = _places(ranges[split:], shape[split:], out.device)
        keys = torch.tensor([zlib.crc32(shard.name.encode(), self._seed & _WORD) for shard in shards])
        rows = _signed(_mixed((rows * 2 + 1) * _SECOND + keys.to(out.device)[:, None] & _WORD)).view(-1)
        columns = _signed(columns * _COLUMN & _WORD)
        step = max(1, CHUNK_ELEMENTS[out.device.type] // max(1, len(columns)))
        flat = (out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)).view(
            len(rows), len(columns)
        )
        for first in range(0, len(rows), step):
            draw(flat[first : first + step], rows[first : first + step, None] + columns)
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))
        on_bytes(sum(shard.nbytes for shard in shards))

    def blocks(self, shard: TensorShard) -> Tensor:
        raise ValueError(f"{shard.name}: random weights have no {shard.dtype} blocks; use --weights dequantised")

    def close(self) -> None:
        pass


Draw = Callable[[Tensor, Tensor], None]
"""Writes values into rows of a tensor, from as many int32 words that are not mixed yet."""


def _draw_of(shard: TensorShard) -> Draw:
    part = shard.role.rpartition(".")[2]
    if (part, shard.dtype) in _CONSTANTS:
        return lambda out, words: _copy(out, torch.full_like(words, _CONSTANTS[part, shard.dtype]))
    if shard.dtype in EXPONENTS and part == "scale":
        return lambda out, words: _copy(out, (_hashed(words) & 1) + MXFP4_SCALE)
    if shard.dtype == "U8":
        return lambda out, words: _copy(out, _hashed(words) >> 23 & 0xFF)
    if shard.dtype == "I8":
        return lambda out, words: _copy(out, _hashed(words) >> 24)
    if shard.dtype == "I32":
        return lambda out, words: _copy(out, _hashed(words))
    if shard.dtype in NUMPY and shard.dtype not in FLOATS:
        raise ValueError(f"{shard.name}: no random weights of storage type {shard.dtype}")
    centre, spread = _range_of(shard)
    return lambda out, words: _copy(out, (_hashed(words) * (spread / (1 << 31))).add_(centre))


def _copy(out: Tensor, values: Tensor) -> None:
    out.copy_(values)


def _range_of(shard: TensorShard) -> tuple[float, float]:
    """Centre and half width of the values of a role. A uniform distribution is as wide as sqrt(3) deviations."""
    if shard.role.endswith(("input_scale", "global_scale", "global_divisor")):
        return 1.0, 0.0
    if shard.role.endswith("scale"):  # of float8 weights, which are drawn from -1 to 1
        return STD * 3**0.5, STD / 2
    if shard.dtype.startswith("F8"):
        return 0.0, 1.0
    if shard.role.endswith("norm.weight"):
        return 1.0, 0.1
    return 0.0, STD * 3**0.5


def _first_column_dim(shape: Sequence[int]) -> int:
    """Dimensions from here on are the columns: the last one, and as many before it as make them long."""
    dim = len(shape) - 1
    while dim > 1 and prod(shape[dim:]) < LEAST_COLUMNS:
        dim -= 1
    return dim


def _places(ranges: Sequence[Sequence[Range]], shape: Sequence[int], device: torch.device) -> Tensor:
    """int64: indices of the selected elements, counted over these dimensions."""
    places = torch.zeros(1, dtype=torch.int64, device=device)
    for each, length in zip(ranges, shape, strict=True):
        inside = [torch.arange(a, b, device=device) for a, b in each]
        indices = torch.cat(inside) if inside else places.new_empty(0)
        places = (places[:, None] * length + indices).view(-1)
    return places


def _signed(words: Tensor) -> Tensor:
    """32-bit words in int64 -> int32 with the same bits."""
    return (words - (words >> 31 << 32)).to(torch.int32)


def _mixed(words: Tensor) -> Tensor:
    """lowbias32 of words in int64."""
    words = (words ^ words >> 16) * _FIRST & _WORD
    words = (words ^ words >> 15) * _SECOND & _WORD
    return words ^ words >> 16


def _hashed(words: Tensor) -> Tensor:
    """lowbias32 of int32 bits, in place, less its last step, which changes the low half only."""
    for shift, factor in ((16, _FIRST), (15, _SECOND - (1 << 32))):
        words ^= words >> shift & (1 << 32 - shift) - 1
        words *= factor
    return words
