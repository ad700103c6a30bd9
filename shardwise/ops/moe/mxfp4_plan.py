"""Launch shapes of the MXFP4 mixture of experts, by how many pairs an expert gets."""

from shardwise.ops.moe.tiles import Plan, Stream, Tiles

_HALF, _FULL = Tiles(128, 64, 4, 4, 4), Tiles(256, 64, 4, 4, 3)
_PAIR = Tiles(128, 64, 4, 4, 2)  # two programs of a multiprocessor unpack while the other one's products run


def choose_plan(pairs: int, experts: int, few: bool = False) -> Plan:
    """Few pairs an expert: narrow token blocks, to read weights at memory rate. Many: wide ones, near the matrix rate.

    few   the kernels for few tokens can be used
    Fastest for 128 experts in benchmarks/results/moe-mxfp4-sweep-h200.json; benchmarks/moe_mxfp4.md says why.
    """
    each = pairs / max(1, experts)
    if few and pairs <= 8:
        return Plan(8, Tiles(16, 64, 1, 9, 12), Tiles(16, 64, 1, 5, 20, 3))
    if few and each <= 1:
        return Plan(8, Tiles(16, 64, 4, 5, 6), Tiles(16, 64, 4, 5, 6))
    if few and each <= 5:
        return Plan(8, Stream(4, 4, 1, 9, 2, 5), Stream(4, 4, 1, 9, 2, 5))
    if few and each <= 10:
        return Plan(16, Stream(4, 2, 1, 5, 2, 8), Stream(4, 2, 1, 5, 2, 8))
    if pairs <= 8:
        return Plan(16, Tiles(256, 128, 8, 4, 1), Tiles(256, 64, 4, 4, 3, 4))
    if each <= 10:
        return Plan(16, _HALF if each <= 4 else _FULL, _FULL)
    if each <= 24:
        return Plan(32, Tiles(256, 64, 4, 6, 2), Tiles(256, 64, 4, 6, 2))
    if each <= 48:
        return Plan(64, Tiles(256, 64, 4, 4, 2), Tiles(256, 64, 4, 4, 2))
    if each <= 90:
        return Plan(64, Tiles(128, 64, 4, 5, 3), Tiles(128, 64, 4, 5, 3), side=16)
    return Plan(128, _PAIR, _PAIR, side=16 if each <= 400 else 0)
