"""Launch shapes of mixtures with given routing, by how many pairs an expert gets."""

from dataclasses import dataclass

from shardwise.ops.moe.routing import power_of_two


@dataclass(frozen=True)
class Shape:
    """Shape of one launch of `grouped_gemm`."""

    bn: int  # weight rows of a tile
    bk: int  # columns of a step
    warps: int
    stages: int
    per_sm: int  # programs that share a multiprocessor
    splits: int = 1  # parts of K, summed by the combine
    group: int = 1  # token blocks that share the weights they read
    tokens_left: bool = False  # tokens are the left operand of the products
    flat: bool = False  # a tile's first loads run beside its predecessor's results


@dataclass(frozen=True)
class GroupedPlan:
    """How a call runs on grouped GEMMs."""

    bt: int  # tokens of a block
    up: Shape
    down: Shape


@dataclass(frozen=True)
class FewPlan:
    """Shapes of `few_up` and `few_down`."""

    up_rows: int  # of the activation, by one program
    down_rows: int  # of the sums and of each choice, by one program
    warps: int
    stages: int


MOST_FEW_CHOICES = 16


def choose_few(pairs: int, experts: int, top_k: int) -> FewPlan | None:
    """For one token, and for so few pairs that hardly two share an expert; else None."""
    if top_k > MOST_FEW_CHOICES or (pairs > top_k and pairs * 4 > experts):
        return None
    return FewPlan(16, max(1, 32 // power_of_two(top_k)), 4, 4)


def choose_plan(pairs: int, experts: int, itemsize: int, blocks: bool = False) -> GroupedPlan:
    """Few pairs an expert: narrow token blocks, to read weights at memory rate. Many: wide ones, near the matrix rate.

    A step of K is 128 bytes, the widest row of a swizzled tile in shared memory.
    blocks   weights have scales of 128 x 128, which a tile must not exceed
    """
    each, bk = pairs / max(1, experts), 128 // itemsize
    if each <= 16:
        return GroupedPlan(16, Shape(64, bk, 4, 4, 3), Shape(64, bk, 4, 6, 3))
    if each <= 64:
        return GroupedPlan(64, Shape(64, bk, 4, 3, 2, group=4), Shape(128, bk, 4, 3, 2, group=4))
    return GroupedPlan(
        128,
        Shape(128, bk, 8, 4, 1, group=8, tokens_left=True),
        Shape(128 if blocks else 256, bk, 8, 4, 1, group=8, tokens_left=True),
    )
