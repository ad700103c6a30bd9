"""How the Triton attention kernels are cut: tile sizes from the head size, splits from the batch."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows (queries) and columns (keys) of one tile, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_two(number: int, least: int = 16) -> int:
    """The next power of two; tl.dot takes no dimension below 16."""
    return max(least, 1 << (number - 1).bit_length())


def decode_tile(group: int, size: int, value_size: int, itemsize: int) -> Tile:
    """32 KB of keys and values a stage, 3 stages: 70 to 74 KB of shared memory, so three programs fit an SM.

    Two have 128 KB on the way; by Little's law an SM of an H200 needs about 30 KB (4.8 TB/s over 132 SMs, 0.8 µs from
    memory), and a program waits for its own products as well.
    """
    row_bytes = (power_of_two(size) + power_of_two(value_size)) * itemsize
    keys = min(128, max(16, power_of_two(32768 // row_bytes)))
    return Tile(rows=power_of_two(group), keys=keys, warps=4, stages=3)


def prefill_tile(rows: int, size: int, value_size: int, itemsize: int) -> Tile:
    """`rows` is the mean number of (token, head) rows of a sequence: short ones take the smaller tile.

    The largest tiles that ptxas keeps in registers on Hopper (compiled for sm_90a; spilled bytes decide). With heads of
    256 elements 64 keys spill 56 bytes a thread outside of the products, and yet took two thirds of the time that 32
    took (H100, 8192 tokens of 16 heads: 1117 for 1650 us).
    """
    widest = max(power_of_two(size), power_of_two(value_size))
    if itemsize > 2:  # float32 products run on the plain cores and hold their operands in registers
        return Tile(rows=32, keys=32, warps=8, stages=1) if widest <= 128 else Tile(rows=16, keys=16, warps=4, stages=1)
    if widest > 256:
        return Tile(rows=64, keys=16, warps=8, stages=2)
    if widest > 128:
        return Tile(rows=128, keys=64, warps=8, stages=2)
    whole = size == value_size == widest  # else masked loads pass through registers
    if rows <= 64:
        return Tile(rows=64, keys=64 if whole else 32, warps=4, stages=3)
    return Tile(rows=128, keys=128 if whole and widest <= 64 else 64, warps=8, stages=3)


MAX_SPLITS = 128
FIT, FILL = 3, 2  # decode programs that an SM holds (`decode_tile`), and that it needs to keep the memory busy
# An SM's time for its programs' bytes, by their number, relative to that of an equal share of the device's memory: one
# alone waits for itself, several read faster than that share. Fitted to shapes of 64 to 2048 programs on an H200.
PACE = {1: 1.1, 2: 0.78, 3: 0.8}
REDUCTION = 5.0  # the second kernel, in tiles that an SM reads meanwhile


@functools.lru_cache(maxsize=4096)
def choose_splits(programs: int, processors: int, max_seq: int, keys: int) -> int:
    """Splits of every sequence's keys for `programs` (sequences x KV heads) that each read the same amount.

    Times are counted in tiles that an SM reads at its share of the memory's bandwidth, a program's beginning being one
    more. Whole waves of programs keep that pace. A first wave that is not full is bound by the SM with the most of
    them. What is left over behind whole waves gathers on few SMs: 116 programs idle the device as much as `FILL` an SM
    would, and 512 unsplit ones took 15 % more time than 1024. The least number within 5 % of the best time is taken.
    """
    wave, whole = FIT * processors, max_seq / keys
    most = max(1, min(MAX_SPLITS, -(-max_seq // keys), 5 * wave // max(1, programs)))
    times = {}
    for splits in range(1, most + 1):
        waves, rest = divmod(programs * splits, wave)
        deepest = -(-rest // processors)
        if waves:
            share = waves * FIT + (max(rest / processors, FILL) if rest else 0)
        else:
            share = max(rest / processors, deepest * PACE[deepest])
        times[splits] = share * (whole / splits + 1) + (REDUCTION if splits > 1 else 0)
    best = min(times.values())
    return min(splits for splits, time in times.items() if time <= 1.05 * best)
