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
        """Of a thread, so that `per_sm` programs fit: a multiprocessor of Hopper has 65536, given out in eights."""
        return min(255, 65536 // (32 * self.warps * self.per_sm) // 8 * 8)


@dataclass(frozen=True)
class Plan:
    """How a call with so many pairs runs."""

    bt: int  # tokens of a block's first product
    up: Tiles
    down: Tiles
    short: int = 0  # a block of at most so many tokens is computed as one of so many; 0: none is
    side: int = 0  # tokens of a second product with the same weights: what a power of two is too small for

    @property
    def few(self) -> bool:
        """Whether `mxfp4_few` runs it."""
        return self.up.bn == 16

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.bt + self.side
