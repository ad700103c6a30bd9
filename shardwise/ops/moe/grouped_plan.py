"""Launch shapes of mixtures with given routing, by how many pairs an expert gets.

Measured in bf16 on the layers of Qwen3-30B-A3B and Mixtral-8x7B: up to 8 pairs an expert on an H100, each product by
itself, from 12 on and the matrix-vector launches on an H200, the whole operator. e4m3 takes the same shapes in bytes.
"""

from dataclasses import dataclass

from shardwise.ops.moe.routing import power_of_two


@dataclass(frozen=True)
class Shape:
    """Shape of one launch of `grouped_gemm`."""

    bn: int
    """Weight rows of a tile; twice as many are read where up and gate rows make a result"""
    bk: int
    """Columns of a step"""
    warps: int
    stages: int
    """Steps that are there or on their way"""
    per_sm: int
    """Programs that share a multiprocessor"""
    splits: int = 1
    """Parts of K, summed by the combine"""
    group: int = 1
    """Token blocks that share the weights they read while these are in the L2 cache"""
    tokens_left: bool = False
    """Tokens are the left operand of the products"""
    specialised: bool = False
    """One warp loads, two warpgroups multiply (`wide_gemm`); steps of 128 bytes"""
    short: int = 0
    """A block of at most so many tokens is computed as one of so many (`wide_gemm`); 0: none is"""
    halves: bool = False
    """Two programs share a tile of a last round that has work for half of them (`wide_gemm`)"""


@dataclass(frozen=True)
class GroupedPlan:
    """How a call runs on grouped GEMMs."""

    bt: int
    """Tokens of a block"""
    up: Shape
    down: Shape
    copied: bool = False
    """Tokens are copied into the experts' order before the first product"""


@dataclass(frozen=True)
class FewShape:
    """Shape of one launch of `few_up` or `few_down`."""

    rows: int
    """Of the activation, or of a token's sum (and of each of its choices), by one program"""
    step: int
    """Bytes of a row and step"""
    warps: int
    stages: int


@dataclass(frozen=True)
class FewPlan:
    """How a call runs on matrix-vector products."""

    up: FewShape
    down: FewShape


MOST_FEW_CHOICES = 16


def choose_few(
    pairs: int, experts: int, top_k: int, itemsize: int, row_bytes: int, alone: bool = False
) -> FewPlan | None:
    """For one token, and while there are two experts a pair but with long rows in e4m3; else None.

    Measured beside the grouped products in bf16: 15 % less time for one token and 5 % less for 64 pairs of 128 experts,
    as much for 128; with 8 experts 6 % less for 4 pairs, 4 % more for 8. In e4m3 (H200) 15 and 8 % less for 2 and 4
    tokens of Qwen3's layer, as much for 8; of Mixtral's rows of 4 KiB 6 % less for one token, 9 % more for two.
    Shapes: rows of 4 KiB in bf16 and e4m3's of 2 KiB were swept on an H200, the other on an H100.

    alone   weights are e4m3 and activations are not: of DeepSeek-V3's experts (H200) one token takes 94 us where
            their bytes take 85, two 170 for 240 by grouped products
    """
    long = itemsize == 1 and row_bytes > 2048
    if top_k > MOST_FEW_CHOICES or (pairs > top_k and ((long and not alone) or pairs * 2 > experts)):
        return None
    rows = max(1, 32 // power_of_two(top_k))
    if alone:
        return FewPlan(FewShape(8, 1024, 4, 3), FewShape(rows, 256, 4, 6))
    if itemsize == 1 and not long:
        return FewPlan(FewShape(8, 1024, 4, 3), FewShape(rows, 256, 4, 6))
    if itemsize == 1:
        return FewPlan(FewShape(8, 2048, 4, 2), FewShape(max(1, rows // 2), 512, 4, 4))
    if row_bytes <= 4096:
        return FewPlan(FewShape(8, 1024, 4, 3), FewShape(rows, 512, 4, 4))
    return FewPlan(FewShape(16, 512, 4, 6), FewShape(rows, 512, 4, 6))


LONG_ROWS = 4096


def choose_plan(pairs: int, experts: int, itemsize: int, blocks: bool = False, columns: int = LONG_ROWS) -> GroupedPlan:
    """Few pairs an expert: narrow token blocks, to read weights at memory rate. Many: wide ones, near the matrix rate.

    A row of a step is 128 bytes, or 256 where a tile is small: that took 5 % off the up products.
    Blocks are as wide as experts rarely exceed, as an expert's second block reads its weights again: with 32 pairs an
    expert, blocks of 64 took 682 us for 821 with blocks of 32 (H200, Mixtral; Qwen3 325 for 342). Two programs a
    multiprocessor fill what is between tiles.
    Many: an expert's last block may be short. Computing it as half of one in the first product took 2 to 5 % off
    Mixtral's rows of 4096, but added 5 % to Qwen3's of 2048 (H100, bf16; 1 % each in e4m3); in the second, nothing.

    blocks    weights have scales of 128 x 128, which a tile must not exceed
    columns   of the first product
    """
    each, bk = pairs / max(1, experts), 128 // itemsize
    long, tall = (bk, 128) if blocks else (2 * bk, 256)
    if each <= 8:  # an expert rarely has more than 16
        return GroupedPlan(16, Shape(64, long, 4, 3, 2), Shape(128, long, 4, 3, 2))
    if each <= 24:
        return GroupedPlan(32, Shape(64, bk, 4, 5, 2, group=4), Shape(128, bk, 4, 5, 2, group=4))
    if each <= 48:
        return GroupedPlan(64, Shape(64, bk, 4, 4, 2, group=4), Shape(128, bk, 4, 4, 2, group=4))
    short = 64 if columns >= LONG_ROWS else 0
    return GroupedPlan(
        128,
        Shape(128, bk, 8, 4, 1, group=4, tokens_left=True, specialised=not blocks, short=short),
        Shape(tall, bk, 8, 4, 1, group=4, tokens_left=True, specialised=not blocks, halves=True),
        copied=not blocks,
    )


def choose_mixed_plan(pairs: int, experts: int, turned: bool = False) -> GroupedPlan:
    """For e4m3 weights whose scales are their own, beside activations of 16 bits: as `choose_plan`, in steps of 128
    columns at most, and with weights as the left operand, which become 16-bit in registers.

    For many pairs blocks of 64 are faster than of 128 (64 of DeepSeek-V3's experts on an H200, 512 tokens: 1.4 and 2.0
    ms, 4096: 8.2 and 8.5; in bf16 1.4 and 5.9). From 256 an expert on, weights turned once for a block of 256 are
    faster still (in turn, 2048 tokens: 4.3 ms for 4.5, 4096: 7.3 for 8.7; blocks of 128 4.4 and 8.4; bf16 3.3 and 5.8).

    turned   `wide_float8` takes both products
    """
    each = pairs / max(1, experts)
    if each <= 8:
        return GroupedPlan(16, Shape(64, 128, 4, 3, 2), Shape(128, 128, 4, 3, 2))
    if each <= 24:
        return GroupedPlan(32, Shape(64, 128, 4, 4, 2, group=4), Shape(128, 128, 4, 4, 2, group=4))
    if not turned or each < 256:
        return GroupedPlan(64, Shape(64, 128, 4, 3, 2, group=4), Shape(128, 128, 4, 3, 2, group=4))
    return GroupedPlan(
        256,
        Shape(64, 64, 8, 3, 1, group=4, specialised=True, short=64),
        Shape(128, 64, 8, 3, 1, group=4, specialised=True, halves=True),
        copied=True,
    )
