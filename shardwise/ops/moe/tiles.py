"""Shapes of grouped GEMM launches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Shape of one grouped GEMM launch."""

    bn: int  # weight rows of a tile; 16: of each warp, by `mxfp4_few`
    bk: int  # weight columns of a step
    warps: int
    stages: int  # steps in flight
    per_sm: int  # programs that share a multiprocessor
    splits: int = 1  # parts of K, summed by the combine

    @property
    def most_registers(self) -> int:
        """Of a thread, so that `per_sm` programs fit."""
        return _registers(self.warps * self.per_sm)


@dataclass(frozen=True)
class Stream:
    """Shape of a launch of `mxfp4_stream`."""

    slabs: int  # of 16 weight rows, of a program: 1, 2 or 4
    row_warps: int  # that share them
    k_warps: int  # sets of such warps, which take k-tiles in turn
    deep: int  # k-tiles of a round, for each set
    ring: int  # rounds that are there or on their way
    per_sm: int
    splits: int = 1

    @property
    def warps(self) -> int:
        """Of a program."""
        return self.row_warps * self.k_warps

    @property
    def most_registers(self) -> int:
        """Of a thread, so that `per_sm` programs fit."""
        return _registers(self.warps * self.per_sm)


def _registers(warps: int) -> int:
    """Of a thread where so many warps share a multiprocessor of Hopper: each of its four parts takes a fourth of them
    and has 16384 registers, given out in eights."""
    return min(255, 16384 // (32 * -(-warps // 4)) // 8 * 8)


@dataclass(frozen=True)
class Plan:
    """How a call with so many pairs runs."""

    bt: int  # tokens of a block's first product
    up: Tiles | Stream
    down: Tiles | Stream
    short: int = 0  # a block of at most so many tokens is computed as one of so many; 0: none is
    side: int = 0  # tokens of a second product with the same weights: what a power of two is too small for

    @property
    def few(self) -> bool:
        """Whether kernels for few tokens run it, which read turned rows."""
        return isinstance(self.up, Stream) or self.up.bn == 16

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.bt + self.side
