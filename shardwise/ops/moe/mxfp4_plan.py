"""Launch shapes of the MXFP4 mixture of experts, by how many pairs an expert gets."""

from shardwise.ops.moe.tiles import Plan, Tiles


def choose_plan(pairs: int, experts: int, few: bool = False) -> Plan:
    """Few pairs an expert: narrow token blocks, to read weights at memory rate. Many: wide ones, near the matrix rate.

    few   the kernel for blocks of eight tokens can be used
    The fastest of 80 shapes on one H100 at 128 experts, 2880 x 2880, top-4, 1 to 1024 tokens (benchmarks/moe_mxfp4.md).
    """
    each = pairs / max(1, experts)
    if few and each <= 0.5:
        splits, ask = (3, 64) if pairs <= 8 else (1, 16)
        return Plan(8, Tiles(16, 64, 1, 5, 16, 1, ask), Tiles(16, 64, 1, 5, 16, splits, ask))
    if pairs <= 8:
        return Plan(16, Tiles(256, 128, 8, 4, 1), Tiles(256, 64, 4, 4, 2, 4))
    if each <= 16:
        return Plan(16, Tiles(256, 64, 4, 4, 3), Tiles(256, 64, 4, 4, 3))
    if each <= 48:
        return Plan(32, Tiles(256, 64, 4, 6, 2), Tiles(256, 64, 4, 6, 2))
    return Plan(128, Tiles(256, 64, 8, 4, 1), Tiles(256, 64, 8, 4, 1), 32)
