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


@dataclass(frozen=True)
class Plan:
    """How a call with so many pairs runs."""

    bt: int  # tokens of a block
    up: Tiles
    down: Tiles
