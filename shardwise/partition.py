"""The one split rule of the package: contiguous parts, remainder to the first ones.

Planner, expert ranges of the MoE operators, ragged collectives and layers all call `extent`;
nothing else in the package divides a length among ranks.
"""


def extent(n: int, parts: int, index: int) -> tuple[int, int]:
    """Half-open range `(start, stop)` of part `index` when `n` units are split into `parts` parts.

    Every part gets `n // parts` units; the first `n % parts` parts get one more.
    Raises ValueError for a negative `n`, `parts < 1` or an index outside `[0, parts)`.
    """
    if n < 0 or parts < 1 or not 0 <= index < parts:
        raise ValueError(f"extent(n={n}, parts={parts}, index={index}): need n >= 0, parts >= 1, 0 <= index < parts")
    base, extra = divmod(n, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def lengths(n: int, parts: int) -> tuple[int, ...]:
    """Length of every part, in order; sums to `n`."""
    base, extra = divmod(n, parts)
    return tuple(base + (i < extra) for i in range(parts))


def owner(n: int, parts: int, unit: int) -> int:
    """Index of the part that holds `unit`, the inverse of `extent`."""
    if not 0 <= unit < n:
        raise ValueError(f"owner(n={n}, parts={parts}, unit={unit}): need 0 <= unit < n")
    base, extra = divmod(n, parts)
    wide = extra * (base + 1)
    return unit // (base + 1) if unit < wide else extra + (unit - wide) // base
