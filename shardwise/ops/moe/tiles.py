"""Shapes of grouped GEMM launches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Shape of one grouped GEMM launch."""

    bn: int  # weight rows of a tile
    bk: int  # weight columns of a step
    warps: int
    stages: int
    per_sm: int  # programs that share a multiprocessor
    splits: int = 1  # parts of K, summed by the combine
    ask: int = 0  # k-tiles that are asked for ahead of their loads, by tiles of 16 rows (`mxfp4_few`)

    @property
    def most_registers(self) -> int:
        """Of a thread, so that `per_sm` programs fit: a multiprocessor of Hopper has 65536, given out in eights."""
        return min(255, 65536 // (32 * self.warps * self.per_sm) // 8 * 8)


@dataclass(frozen=True)
class Plan:
    """How a call with so many pairs runs."""

    bt: int  # tokens of a block
    up: Tiles
    down: Tiles
    short: int = 0  # a block of at most so many tokens is computed as one of so many; 0: none is
