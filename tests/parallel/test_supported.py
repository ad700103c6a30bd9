"""What the runtime says it cannot run: no option of a block goes unnoticed."""

from dataclasses import fields

import pytest

from shardwise.parallel import supported
from shardwise.sharding import spec

IMPLEMENTED = {
    spec.Attention: "q_axis kv_axis head_dim v_head_dim scale rope window softcap sinks norm_eps norm_weight_offset",
    spec.DenseMlp: "mlp_axis activation gated",
    spec.Moe: "expert_axis mlp_axis routing activation stacked transposed gate_up_interleaved limit alpha shared "
    "shared_gated",
    spec.Routing: "top_k score softmax_after_topk normalize bias_correction groups top_groups group_score scale",
    spec.Norm: "eps weight_offset",
    spec.Embedding: "vocab multiplier",
}
"""Every value of these has a layer; the others' legal values stand in `supported.py`."""
DETAILS = {spec.Attention: {"index_head_dim", "index_topk", "index_block"}}
"""Fields that mean something only together with one that is refused."""


@pytest.mark.parametrize("kind", IMPLEMENTED, ids=lambda kind: kind.__name__)
def test_every_option_of_a_block_is_implemented_or_refused(kind):
    known = {*IMPLEMENTED[kind].split(), *supported._LEGAL.get(kind, {}), *DETAILS.get(kind, ())}
    assert {field.name for field in fields(kind)} - {"tensors"} == known
