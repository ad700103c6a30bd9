"""What eight GPUs would hold of a model, from its config alone: no weights, no GPU, no torch.

python examples/plan_a_model.py path/to/config.json
"""

import sys

from shardwise import ParallelLayout, plan

if len(sys.argv) != 2:
    sys.exit(__doc__)
planned = plan(sys.argv[1], ParallelLayout(tp=8, moe_ep=8))
print(f"{planned.model.name}: {planned.parameters / 1e9:.1f} B parameters under {planned.layout}")
for totals in planned.ranks:
    print(f"rank {totals.rank}: {totals.weight_bytes / 2**30:.2f} GiB, {totals.kv_bytes_per_token} B of cache a token")
cut = [shard for shard in planned.shards(3) if shard.local_shape != shard.global_shape]
for shard in cut[:3]:
    print(f"rank 3 holds {shard.local_shape} of {shard.name} {shard.global_shape}: indices {shard.ranges}")
