"""A folder that `shardwise shard` wrote is a model: it runs at its layout, and nowhere else."""

import pytest
from tiny import expected_tokens, generate, write

from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.checkpoint.shard import write_shards
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan


@pytest.mark.parametrize(
    "model_type, fields, layout",
    [
        ("llama", {}, ParallelLayout(tp=2)),
        ("mixtral", dict(num_local_experts=5), ParallelLayout(tp=2, moe_ep=2)),
    ],
    ids=["llama", "mixtral"],
)
def test_tokens_equal_those_of_the_original(model_type, fields, layout, tmp_path):
    folder = write(tmp_path / "model", model_type, **fields)
    out = tmp_path / "out"
    write_shards(plan(str(folder), layout), open_checkpoint(folder), out)
    for tokenizer_file in folder.glob("*.json"):
        assert (out / tokenizer_file.name).is_file()
    expected = expected_tokens(folder)
    for completions in generate(out, layout):
        assert [list(c.token_ids) for c in completions] == expected


def test_another_number_of_ranks_is_refused(tmp_path):
    folder = write(tmp_path / "model", "llama")
    out = tmp_path / "out"
    write_shards(plan(str(folder), tp=2), open_checkpoint(folder), out)
    with pytest.raises(CheckpointError, match="written for 2 ranks, this job has 1"):
        generate(out, ParallelLayout(tp=1))
