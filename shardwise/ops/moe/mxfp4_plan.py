"""Launch shapes of the MXFP4 mixture of experts, by how many pairs an expert gets."""

from shardwise.ops.moe.tiles import Plan, Tiles

_HALF, _FULL = Tiles(128, 64, 4, 4, 4), Tiles(256, 64, 4, 4, 3)
_WIDE, _WIDEST = Tiles(256, 64, 8, 4, 1), Tiles(128, 64, 8, 4, 1)


def choose_plan(pairs: int, experts: int, few: bool = False) -> Plan:
    """Few pairs an expert: narrow token blocks, to read weights at memory rate. Many: wide ones, near the matrix rate.

    few   the kernel for blocks of eight tokens can be used
    benchmarks/moe_mxfp4.md tells which of these were measured and which are predicted.
    """
    each = pairs / max(1, experts)
    if few and each <= 0.5:
        if pairs > 32:
            return Plan(8, Tiles(16, 64, 1, 5, 24), Tiles(16, 64, 1, 5, 24))
        splits, ask = (3, 64) if pairs <= 8 else (1, 16)
        return Plan(8, Tiles(16, 64, 1, 5, 16, 1, ask), Tiles(16, 64, 1, 5, 16, splits, ask))
    if pairs <= 8:
        return Plan(16, Tiles(256, 128, 8, 4, 1), Tiles(256, 64, 4, 4, 3, 4))
    if each <= 10:
        return Plan(16, _HALF if each <= 4 else _FULL, _FULL)
    if each <= 40:
        return Plan(32, Tiles(256, 64, 4, 6, 2), Tiles(256, 64, 4, 6, 2))
    if each <= 72:
        return Plan(64, _WIDE, _WIDE, 32)
    if each <= 180:
        return Plan(128, _WIDE, _WIDE, 32)
    return Plan(256, _WIDEST, _WIDEST, 64)
