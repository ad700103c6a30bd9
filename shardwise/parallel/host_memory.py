"""How much memory of the host this process may still take: what is available, within its control groups' limits.

Source: Linux' Documentation/filesystems/proc.rst and admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 60
"""Control groups of version 1 write "none" as a number about this large."""
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def host_memory(root: Path = ROOT) -> tuple[int, int]:
    """(bytes free, bytes in all). Pages of files count as free, since the kernel takes them back, and so does swap."""
    info = _table(root / "proc/meminfo")
    free = 1024 * (info.get("MemAvailable:", 0) + info.get("SwapFree:", 0))
    total = 1024 * info.get("MemTotal:", 0)
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
