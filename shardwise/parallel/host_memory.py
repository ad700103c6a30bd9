"""How much memory of the host this process may still take: what is available, within its control groups' limits.

Source: Linux' Documentation/filesystems/proc.rst and admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
RANK_BYTES = 128 << 20
"""Of a rank that has imported torch and joined its group; 145 MiB were measured with torch 2.13 on the CPU."""
NO_LIMIT = 1 << 60
"""Control groups of version 1 write "none" as a number about this large."""
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


class DoesNotFit(ValueError):
    """Some memory is too small for what was asked; `exit_code` is the job's."""

    exit_code = 3


def require_ranks(world: int) -> None:
    """DoesNotFit when this host cannot hold so many interpreters with torch."""
    most = host_memory()[0] // RANK_BYTES
    if world > most:
        raise DoesNotFit(
            f"{world} ranks do not fit on this host: each takes {RANK_BYTES >> 20} MiB of its own before it loads "
            f"anything; what fits: {most}"
        )


def require_bytes(needed: int, what: str, place: str = "") -> None:
    """DoesNotFit when this host has fewer bytes free; `what` takes them, at `place`, such as " on 2 ranks"."""
    free = host_memory()[0]
    if needed > free:
        raise DoesNotFit(f"{what} take {needed / 2**30:.1f} GiB{place}, and this host has {free / 2**30:.1f} GiB free")


def host_memory(root: Path = ROOT) -> tuple[int, int]:
    """(bytes free, bytes in all). Pages of files count as free, since the kernel takes them back, and so does swap."""
    info = _table(root / "proc/meminfo")
    total = 1024 * info.get("MemTotal:", NO_LIMIT // 1024)
    kept = info.get("MemAvailable:", info.get("MemFree:", total // 1024))  # sandboxes do not tell all
    free = 1024 * (kept + info.get("SwapFree:", 0))
    for limit, used in _limits(root):
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def memory_limit(root: Path = ROOT) -> int | None:
    """The least limit of this process's control groups, in bytes."""
    return min((limit for limit, _ in _limits(root)), default=None)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that stay) of this process's control group and of those around it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        files = _V1 if controllers else _V2
        folder = base / name.lstrip("/")
        while folder.is_relative_to(base):  # a container may see its own group as the uppermost one
            found = _limit(folder, *files)
            if found is not None:
                yield found
            if folder == base:
                break
            folder = folder.parent


def _limit(folder: Path, limit: str, usage: str, pages: tuple[str, ...]) -> tuple[int, int] | None:
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
    except OSError:
        return None
    if not most.isdigit() or int(most) >= NO_LIMIT:
        return None
    of_files = _table(folder / "memory.stat")
    return int(most), int(used) - sum(of_files.get(name, 0) for name in pages)


def _table(path: Path) -> dict[str, int]:
    """Lines of a name, a number and perhaps a unit."""
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
