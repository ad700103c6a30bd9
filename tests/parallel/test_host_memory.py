"""What the kernel's files say of free memory."""

import pytest

from shardwise.parallel.host_memory import host_memory, memory_limit

MIB = 2**20
MEMINFO = "MemTotal: 8192 kB\nMemFree: 100 kB\nMemAvailable: 4096 kB\nSwapFree: 1024 kB\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    (tmp_path / "proc/self/cgroup").write_text("")
    return tmp_path


def group(root, place, files: dict[str, object]) -> None:
    folder = root / "sys/fs/cgroup" / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_without_limits_it_is_what_is_available_and_swap(root):
    assert host_memory(root) == (5 * MIB, 8 * MIB) and memory_limit(root) is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_group_around_the_process_bounds_it_and_pages_of_files_are_free(root, version):
    if version == 1:
        (root / "proc/self/cgroup").write_text("3:cpuset:/\n4:memory:/job/step\n")
        names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), "memory/"
    else:
        (root / "proc/self/cgroup").write_text("0::/job/step\n")
        names, base = ("memory.max", "memory.current", "inactive_file"), ""
    limit, usage, pages = names
    group(
        root, base + "job/step", {limit: "max" if version == 2 else 9223372036854771712, usage: MIB, "memory.stat": ""}
    )
    group(root, base + "job", {limit: 3 * MIB, usage: 2 * MIB, "memory.stat": f"{pages} {MIB}"})
    assert host_memory(root) == (2 * MIB, 3 * MIB) and memory_limit(root) == 3 * MIB


def test_a_container_that_sees_its_own_group_as_the_root_is_bounded_by_it(root):
    (root / "proc/self/cgroup").write_text("0::/../elsewhere\n")
    group(root, "", {"memory.max": MIB, "memory.current": 2 * MIB, "memory.stat": ""})
    assert host_memory(root) == (0, MIB)


def test_what_a_sandbox_does_not_tell_refuses_nothing(root):
    (root / "proc/meminfo").write_text("MemTotal: 8192 kB\nMemFree: 100 kB\n")
    assert host_memory(root) == (100 * 1024, 8 * MIB)
    (root / "proc/meminfo").unlink()
    free, total = host_memory(root)
    assert min(free, total) >= 2**59


def test_this_machine_has_memory():
    free, total = host_memory()
    assert 0 < free <= total
