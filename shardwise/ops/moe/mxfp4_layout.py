"""MXFP4 weights in the order in which a tensor-core fragment consumes them, made once per weight tensor.

A tile is 64 rows x 64 columns. Its codes are 512 int32 words [4 slabs of 16 rows, 8 rows, 4 lanes, 4 k-steps of 16]:
the four words of one (row, lane) are 16 contiguous bytes and hold what one thread of the m64k16 fragment needs for
four k-steps. A word holds 2 rows (r, r + 8) x 2 k-halves (k, k + 8) x 2 neighbours in k. The four bits of a code lie
where one shift and one mask bring them to the sign, the low exponent and the high mantissa bits of a bfloat16 (see
`mxfp4_convert.py`). Its scales are 32 words [4 slabs, 8 rows], bytes (row r: k-blocks 0, 1; row r + 8: the same).

Gate and up rows go to rows r and r + 8 of a slab, so that one thread holds both for the activation.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter, call, is_
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shardwise.ops.kernel_launch import address_of

Packed = TypeVar("Packed")
TILE = 64
NEAR = 4096
"""Sets of tensors that are known by their identity"""
# Bit of (sign, exponent high, exponent low, mantissa) inside a 16-bit half, for the four registers of a word; the
# sign of register 1 crosses to the other half.
BITS = ((15, 8, 7, 6), (5, 14, 13, 12), (9, 2, 1, 0), (11, 4, 3, 10))
MAX_NARROW_SCALE = 128  # 2**126 * 2**(scale - 127) is a finite bfloat16 up to here


@dataclass(frozen=True)
class PackedMXFP4:
    """A stack of expert matrices [E, N, K], re-laid out; N and K are padded to multiples of 64 with zeros."""

    words: Tensor  # int32 [E, N/64, K/64, 4, 8, 4, 4]
    scales: Tensor  # int32 [E, N/64, K/64, 4, 8]
    bias: Tensor  # float32 [E, N padded], in the packed row order
    rows: int  # N
    columns: int  # K
    format: str
    """"narrow"; "wide" where some scale exceeds MAX_NARROW_SCALE and the kernel multiplies in two steps; "nvfp4"."""


def pack_mxfp4(blocks: Tensor, scales: Tensor, bias: Tensor, paired: bool) -> PackedMXFP4:
    """Re-lay out blocks uint8 [E, N, K/32, 16], scales uint8 [E, N, K/32] and bias [E, N].

    paired   rows alternate gate, up (even, odd); False for plain rows
    Works on any device; expert by expert, so that the peak is one expert's codes.
    """
    experts, rows, groups, _ = blocks.shape
    columns = groups * 32
    tiles_n, tiles_k = -(-rows // TILE), -(-columns // TILE)
    order = row_order(rows, tiles_n * TILE, "alternating" if paired else "plain", blocks.device)
    words = torch.empty((experts, tiles_n, tiles_k, 4, 8, 4, 4), dtype=torch.int32, device=blocks.device)
    packed_scales = torch.empty((experts, tiles_n, tiles_k, 4, 8), dtype=torch.int32, device=blocks.device)
    for expert in range(experts):
        words[expert] = pack_codes(blocks[expert].flatten(1), order, tiles_n, tiles_k)
        packed_scales[expert] = _pack_scales(scales[expert], order, tiles_n, tiles_k)
    padded_bias = F.pad(bias.float(), (0, 1))[:, order]
    highest = int(scales.max()) if scales.numel() else 0
    scale_format = "wide" if highest > MAX_NARROW_SCALE else "narrow"
    return PackedMXFP4(words, packed_scales, padded_bias.contiguous(), rows, columns, scale_format)


def row_order(rows: int, padded: int, arrangement: str, device: torch.device) -> Tensor:
    """Source row of every packed row; `rows` (one past the end) for padding.

    arrangement   "plain"; "alternating" (gate, up, gate, ...); "stacked" (all up rows, then all gate rows)
    """
    position = torch.arange(padded, device=device)
    if arrangement == "plain":
        return position.clamp(max=rows)
    half, out = position // 8 % 2, position // 16 * 8 + position % 8
    source = 2 * out + half if arrangement == "alternating" else out + (1 - half) * (rows // 2)
    return torch.where(out < rows // 2, source, rows)


def pack_codes(codes: Tensor, order: Tensor, tiles_n: int, tiles_k: int) -> Tensor:
    """Bytes [N, K/2] (low nibble first) to words [N/64, K/64, 4, 8, 4, 4]."""
    padded = F.pad(codes, (0, tiles_k * TILE // 2 - codes.shape[1], 0, 1))[order]
    # columns of a tile: k-step (4), k-half (2), lane (4), then the two nibbles of the byte
    view = padded.view(tiles_n, 4, 2, 8, tiles_k, 4, 2, 4).permute(0, 4, 1, 3, 7, 5, 6, 2)
    # now [N/64, K/64, slab, row, lane, step, k-half, row-half]; register = 2 * k-half + row-half
    table = _code_bits(codes.device)
    word = table[0][view[..., 0, 0].int()]
    for register in range(1, len(BITS)):
        word |= table[register][view[..., register // 2, register % 2].int()]
    return word


@cache
def _code_bits(device: torch.device) -> Tensor:
    """int32 [4, 256]: what a byte of two codes contributes to its word, in each of the four registers."""
    table = torch.zeros(len(BITS), 256, dtype=torch.int64)
    byte = torch.arange(256)
    for register, bits in enumerate(BITS):
        for half in (0, 1):
            nibble = (byte >> (4 * half)) & 0xF
            for source, target in zip((3, 2, 1, 0), bits, strict=True):
                crosses = register == 1 and source == 3
                table[register] |= ((nibble >> source) & 1) << (target + 16 * (half ^ crosses))
    return torch.where(table >= 2**31, table - 2**32, table).to(device, torch.int32)


def _pack_scales(scales: Tensor, order: Tensor, tiles_n: int, tiles_k: int) -> Tensor:
    """Bytes [N, K/32] to words [N/64, K/64, 4, 8]."""
    padded = F.pad(scales, (0, tiles_k * 2 - scales.shape[1], 0, 1))[order]
    view = padded.view(tiles_n, 4, 2, 8, tiles_k, 2).permute(0, 4, 1, 3, 2, 5)  # [.., slab, row, row-half, k-block]
    return join_bytes(view.flatten(-2))


def join_bytes(parts: Tensor) -> Tensor:
    """Four bytes of the last dimension to one int32, the first lowest."""
    shifts = torch.tensor([0, 8, 16, 24], device=parts.device)
    word = (parts.to(torch.int64) << shifts).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


class PackedOnce(Generic[Packed]):
    """What is made of weight tensors, kept as long as the sources' memory lives and none of them is written to.

    What has lost its sources is given back when something is made of other ones, here or in another instance.
    """

    _everywhere: ClassVar["weakref.WeakSet[PackedOnce]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._kept: dict[tuple, _Made[Packed]] = {}
        # The same, by the first source's identity, for calls that bring the very tensors of an earlier one.
        self._near: dict[tuple[int, str], _Near[Packed]] = {}
        self._everywhere.add(self)

    def get(self, sources: tuple[Tensor, ...], arrangement: str, make: Callable[[], Packed]) -> Packed:
        """What `make` gave for these sources before, or gives now."""
        near = self._near.get((id(sources[0]), arrangement))
        if near is not None and near.brought_again(sources):
            return near.made.packed
        made = self._get(sources, arrangement, make)
        if len(self._near) >= NEAR:
            self._near.clear()
        self._near[id(sources[0]), arrangement] = _Near([weakref.ref(source) for source in sources], made)
        return made.packed

    def _get(self, sources: tuple[Tensor, ...], arrangement: str, make: Callable[[], Packed]) -> "_Made[Packed]":
        key = (arrangement, *((source.data_ptr(), source.shape, source.stride()) for source in sources))
        found = self._kept.get(key)
        if found is not None and found.holds(sources, tracked=False):
            return found
        for each in list(self._everywhere):
            each._give_back()
        found = self._kept[key] = _Made.of(sources, make)
        return found

    def _give_back(self) -> None:
        for stale in [key for key, entry in list(self._kept.items()) if entry.expired]:
            self._kept.pop(stale, None)  # ranks may be threads, and another one was quicker
        self._near.clear()


_NO_VERSION = -1
_is_gone = torch.UntypedStorage._expired
_version_of = attrgetter("_version")


@dataclass(frozen=True, slots=True)
class _Made(Generic[Packed]):
    """What was made of sources, and what tells whether these are as they were."""

    storages: tuple[StorageWeakRef, ...]
    handles: tuple[int, ...]
    """Of the storages"""
    addresses: tuple[int, ...]
    versions: tuple[int, ...]
    tracked: bool
    """Whether all sources have versions: those made in inference mode have none"""
    packed: Packed

    @classmethod
    def of(cls, sources: tuple[Tensor, ...], make: Callable[[], Packed]) -> "_Made[Packed]":
        storages = tuple(StorageWeakRef(source.untyped_storage()) for source in sources)
        handles, addresses = tuple(storage.cdata for storage in storages), tuple(map(address_of, sources))
        versions = _versions(sources, tracked=False)
        return cls(storages, handles, addresses, versions, _NO_VERSION not in versions, make())

    def holds(self, sources: tuple[Tensor, ...], tracked: bool) -> bool:
        # An assignment to a tensor's `data` changes neither its identity nor its version.
        same = self.addresses == (*map(address_of, sources),) and self.versions == _versions(sources, tracked)
        return same and not self.expired

    @property
    def expired(self) -> bool:
        return any(map(_is_gone, self.handles))


class _Near(NamedTuple, Generic[Packed]):
    tensors: list[weakref.ref]
    made: _Made[Packed]

    def brought_again(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether these are the very tensors, and as they were."""
        same = all(map(is_, map(call, self.tensors), sources))
        return same and self.made.holds(sources, self.made.tracked)


def _versions(sources: tuple[Tensor, ...], tracked: bool) -> tuple[int, ...]:
    if tracked:
        return (*map(_version_of, sources),)
    return tuple([_NO_VERSION if source.is_inference() else _version_if_any(source) for source in sources])


def _version_if_any(source: Tensor) -> int:
    try:
        return source._version
    except RuntimeError:  # a tensor made in inference mode, whose `data` is now memory that was not
        return _NO_VERSION


_PACKED: PackedOnce[PackedMXFP4] = PackedOnce()


def packed_once(blocks: Tensor, scales: Tensor, bias: Tensor, paired: bool) -> PackedMXFP4:
    """`pack_mxfp4` of these tensors, made at the first call."""
    arrangement = "alternating" if paired else "plain"
    return _PACKED.get((blocks, scales, bias), arrangement, lambda: pack_mxfp4(blocks, scales, bias, paired))
