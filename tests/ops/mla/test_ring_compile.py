"""Attention's ring kernel as compiled for Hopper keeps its promises: what the interpreter cannot show."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import printed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""


@pytest.mark.skipif(not TRITON.startswith("3.6."), reason="the kernel is written for Triton 3.6")
def test_products_run_side_by_side_from_tiles_that_fit_a_multiprocessor():
    rows = json.loads(printed(Path(__file__).parent / "compile_ring.py", timeout=500)[-1])
    assert [row["heads"] for row in rows] == [16, 128]
    for row in rows:
        assert not row["serialized"] and not row["stack"], row
        assert row["shared_bytes"] <= 227 * 1024, row
        # 64 keys by 576 columns in copies of 64; scores in steps of 16 columns, values in both halves of 16 keys
        assert row["tiles_by_tensor_memory"] == 9, row
        assert row["products"] == 36 + 2 * 4 * (4 if row["heads"] == 16 else 2), row


def test_only_widths_that_fit_take_the_ring(monkeypatch):
    """With 128 rotated columns the rings need 248 KiB of shared memory, and latents of 256 do not compile."""
    from shardwise.ops.mla import decode

    monkeypatch.setattr(decode, "ROLES", True)
    monkeypatch.setattr(decode, "asynchronous_products", lambda device: True)

    def plan(rank, rope, dtype=torch.bfloat16, page=64):
        return decode.plan_for(16, torch.empty(1, page, rank + rope, dtype=dtype, device="meta"), rank)

    assert plan(512, 64) == decode.ring_for(16)
    others = plan(512, 128), plan(256, 64), plan(512, 32), plan(512, 64, torch.float32), plan(512, 64, page=32)
    assert all(isinstance(other, decode.Tile) for other in others)
    monkeypatch.setattr(decode, "ROLES", False)
    assert isinstance(plan(512, 64), decode.Tile)


@pytest.mark.parametrize("version, roles", [("3.6.0", True), ("3.5.1", False), ("3.7.0", False)])
def test_the_ring_asks_for_the_language_that_it_is_written_in(version, roles):
    program = (
        f"import triton; triton.__version__ = {version!r}; from shardwise.ops import gluon_support as g; print(g.ROLES)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, env=environment)
    assert done.stdout.strip() == str(roles), done.stderr[-3000:]
