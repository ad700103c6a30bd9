"""The tuned kernels as the compiler makes them for Hopper: no GPU is needed to see registers and instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("p2p_compile.py")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(PROGRAM)], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_tuned_kernel_spills_registers_and_all_are_resident(rows):
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] * 32 * row["warps"] <= 65536, row


def test_peers_are_written_and_watched_in_16_byte_system_scope_accesses(rows):
    for row in rows:
        assert row["pushes"] > 0, row
        assert row["looks"] > 0, row


def test_launches_may_overlap_and_never_use_multicast(rows):
    assert all(row["dependent_launch"] and not row["multicast"] for row in rows)
