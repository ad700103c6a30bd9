"""The reference mixtures of experts: which pairs count, where the weight goes, and tokens that travel."""

import json

import pytest
import torch
from oracles_moe import relative, routed_oracle, routing, stacked

from shardwise.ops.moe.contract import ExpertMapping, parse_mapping
from shardwise.ops.moe.reference import torch_moe_fused
from shardwise.partition import extent
from shardwise.sharding.layout import ParallelLayout
from shardwise.testing import run_threads

OPS = torch.ops.auto_deploy
EXPERTS, HIDDEN, SIZE, TOP_K = 7, 16, 8, 3


def test_repeated_and_foreign_ids():
    first, second = stacked(3, HIDDEN, SIZE, True)
    x = torch.randn(4, HIDDEN)
    ids = torch.tensor([[1, 1], [-1, 2], [3, 0], [-5, 9]])
    weights = torch.rand(4, 2)
    got = OPS.torch_moe_fused(x, ids, weights, first, second)
    assert relative(got, routed_oracle(x, ids, weights, first, second)) < 1e-6
    assert torch.equal(got[3], torch.zeros(HIDDEN))


def test_no_tokens_and_int32_ids():
    first, second = stacked(3, HIDDEN, SIZE, True)
    ids, weights = routing(0, 2, 3)
    assert OPS.torch_moe_fused(torch.empty(0, HIDDEN), ids.int(), weights, first, second).shape == (0, HIDDEN)


def test_experts_are_summed_in_float32():
    torch.manual_seed(0)
    x, (first, second) = torch.randn(1, HIDDEN).bfloat16(), stacked(64, HIDDEN, SIZE, True, dtype=torch.bfloat16)
    ids, weights = torch.arange(64)[None], torch.ones(1, 64)
    got = OPS.torch_moe_fused(x, ids, weights, first, second)
    assert got.dtype == torch.bfloat16
    assert relative(got, routed_oracle(x, ids, weights, first, second)) < 6e-3


def shared_call(mapping, limit, tokens, on_input=False):
    """One rank's call of torch_moe with its own tokens and experts, and what the oracle says of them."""
    torch.manual_seed(3)
    first, second = stacked(EXPERTS, HIDDEN, SIZE, False)
    calls = [(torch.randn(count, HIDDEN), *routing(count, TOP_K, EXPERTS)) for count in tokens]
    for _, ids, _ in calls:
        ids[:, 0] = torch.arange(len(ids)) % EXPERTS

    def rank_body():
        from shardwise.comm.rank import current_groups

        group = current_groups().moe_ep
        part = slice(*extent(EXPERTS, group.size, group.rank))
        x, ids, weights = calls[group.rank]
        ours = OPS.torch_moe(x, ids, weights, [*first[part]], [*second[part]], [], False, 8, mapping, limit, on_input)
        return relative(ours, routed_oracle(x, ids, weights, first, second, False, on_input)) if len(x) else len(ours)

    return rank_body


def mapping_text(ranks):
    return json.dumps({"enable_attention_dp": True, "moe_ep_size": ranks, "num_experts": EXPERTS, "rank": 0})


@pytest.mark.parametrize("limit", [0, 6])
@pytest.mark.parametrize("tokens", [(3, 5), (0, 2, 6), (1, 1, 0, 4)])
def test_tokens_travel_to_their_experts_and_back(tokens, limit):
    ranks = len(tokens)
    layout = ParallelLayout(tp=1, attn_dp=ranks, moe_tp=1, moe_ep=ranks)
    errors = run_threads(ranks, shared_call(mapping_text(ranks), limit, tokens, ranks == 2), layout=layout)
    assert all(error < 1e-6 for error in errors), errors


def test_more_tokens_than_the_limit_and_missing_groups_are_named():
    layout = ParallelLayout(tp=1, attn_dp=2, moe_tp=1, moe_ep=2)
    with pytest.raises(ValueError, match="5 tokens exceed max_num_tokens=4"):
        run_threads(2, shared_call(mapping_text(2), 4, (5, 5)), layout=layout)
    with pytest.raises(ValueError, match="moe_ep_size=3, but the current moe_ep group has 2 ranks"):
        run_threads(2, shared_call(mapping_text(3), 4, (5, 5)), layout=layout)
    x, (ids, weights) = torch.randn(2, HIDDEN), routing(2, 2, 2)
    first, second = stacked(2, HIDDEN, SIZE, False)
    with pytest.raises(ValueError, match="moe_ep_size=2, but the current moe_ep group has 1 ranks; run inside"):
        OPS.torch_moe(x, ids, weights, [*first], [*second], [], False, 8, mapping_text(2))


def test_the_mapping_is_json_with_other_names_ignored():
    assert parse_mapping("") == ExpertMapping() and not ExpertMapping().exchanges_tokens
    assert parse_mapping('{"moe_ep_size": 4, "world_size": 8, "enable_attention_dp": true}').exchanges_tokens
    assert parse_mapping('{"moe_ep_size": 4}').local_range(2, 3) == (6, 8)
    with pytest.raises(ValueError, match="share of num_experts=7 is 2"):
        parse_mapping('{"moe_ep_size": 3, "num_experts": 7}').local_range(3, 2)
    for text in ("[1]", "no json", '{"moe_ep_size": "two"}', '{"enable_attention_dp": 1}'):
        with pytest.raises(ValueError, match="mapping_config"):
            parse_mapping(text)


FIRST, SECOND = stacked(3, HIDDEN, SIZE, True)
X, (IDS, WEIGHTS) = torch.randn(4, HIDDEN), routing(4, 2, 3)
FP8, ONE = FIRST.to(torch.float8_e4m3fn), torch.ones(())
NVFP4 = torch.zeros(3, 2 * SIZE, HIDDEN // 2, dtype=torch.uint8), torch.zeros(3, HIDDEN, SIZE // 2, dtype=torch.uint8)
BLOCKS = torch.zeros(3, 128, 4, dtype=torch.uint8), torch.zeros(3, 128, 4, dtype=torch.uint8)
CASES = {
    r"must be \[T, K\] with T = 4": ("torch_moe_fused", ValueError, (X, IDS[:3], WEIGHTS, FIRST, SECOND)),
    "must be int32 or int64": ("torch_moe_fused", TypeError, (X, IDS.float(), WEIGHTS, FIRST, SECOND)),
    "must have the shape of selected_experts": (
        "torch_moe_fused",
        ValueError,
        (X, IDS, WEIGHTS[:, :1], FIRST, SECOND),
    ),
    r"need \[E, 2I, H\] and \[E, H, I\]": ("torch_moe_fused", ValueError, (X, IDS, WEIGHTS, FIRST, SECOND[:, :3])),
    "act_fn=2": ("torch_moe", ValueError, (X, IDS, WEIGHTS, [FIRST[0]], [SECOND[0]], [], False, 2)),
    "equally long": ("torch_moe", ValueError, (X, IDS, WEIGHTS, [FIRST[0]], [SECOND[0]], [])),
    "not gated with Relu2": ("triton_moe_fused", ValueError, (X, IDS, WEIGHTS, FIRST, SECOND, True, 8)),
    "must share a dtype": ("triton_moe_fused", TypeError, (X, IDS, WEIGHTS, FIRST.half(), SECOND, True, 4)),
    "must have one dtype": ("torch_moe_fused", TypeError, (X, IDS, WEIGHTS, FIRST.half(), SECOND)),
    "x must be floating point": ("torch_moe_fused", TypeError, (X.int(), IDS, WEIGHTS, FIRST, SECOND)),
    r"w2_weight\[1\] must be \[16, 16\] \(H = 16, I = 16 rows of w1_weight\[0\]\), got \[16, 8\]": (
        "torch_moe",
        ValueError,
        (X, IDS, WEIGHTS, [*FIRST], [torch.zeros(16, 16), *SECOND[1:]], [], False, 8),
    ),
    r"dtype of w1_weight\[0\], torch.float32, got .*w3_weight\[2\] torch.float16": (
        "torch_moe",
        TypeError,
        (X, IDS, WEIGHTS, [*FIRST[:, :SIZE]], [*SECOND], [*FIRST[:2, :SIZE], FIRST[2, :SIZE].half()]),
    ),
    "w1_input_scale must have 1 or 3 elements": (
        "triton_quant_fp8_moe",
        ValueError,
        (X, IDS, WEIGHTS, FP8, SECOND.to(FP8.dtype), ONE, torch.ones(0), *[ONE] * 2, *[torch.ones(3)] * 3, True, 4),
    ),
    r"gate_up_b must be \[3, 16\]": (
        "torch_moe_dense_mlp",
        ValueError,
        (X, torch.rand(4, 3), FIRST.mT, X, SECOND.mT, X),
    ),
    "call .contiguous\\(\\) on it once": (
        "triton_moe_fused",
        ValueError,
        (X, IDS, WEIGHTS, FIRST.mT.contiguous().mT, SECOND, True, 4),
    ),
    "needs max_num_tokens > 0": (
        "trtllm_moe_fused",
        ValueError,
        (X, IDS, WEIGHTS, FIRST, SECOND, True, 4, mapping_text(2)),
    ),
    r"w1_weight_scale, w2_weight_scale and w3_weight_scale must be as long as the weights' \(1, 1, 0\), got 1, 0, 0": (
        "torch_quant_fp8_moe",
        ValueError,
        (X, IDS, WEIGHTS, [FP8[0]], [FP8[0].mT], [], [ONE], [ONE], [], [ONE], [], [], False, 8),
    ),
    "fc2_expert_weights_fp4 must be uint8": (
        "trtllm_quant_nvfp4_moe_fused",
        TypeError,
        (X, IDS, WEIGHTS, NVFP4[0], NVFP4[1].char(), *BLOCKS, ONE, ONE, ONE, ONE, True, 4),
    ),
    "fc1_weight_blockscale_fp8 must be uint8 or float8_e4m3fn with 3 dimensions, got torch.uint8": (
        "trtllm_quant_nvfp4_moe_fused",
        ValueError,
        (X, IDS, WEIGHTS, *NVFP4, BLOCKS[0][0], BLOCKS[1], ONE, ONE, ONE, ONE, True, 4),
    ),
    "block scales of 3 experts of 16 x 16 must be": (
        "trtllm_quant_nvfp4_moe_fused",
        ValueError,
        (X, IDS, WEIGHTS, *NVFP4, BLOCKS[0][:, :64], BLOCKS[1], ONE, ONE, ONE, ONE, True, 4),
    ),
    "fc2_alpha must have 1 or 3 elements": (
        "trtllm_quant_nvfp4_moe_fused",
        ValueError,
        (X, IDS, WEIGHTS, *NVFP4, *BLOCKS, ONE, ONE, ONE, torch.ones(2), True, 4),
    ),
    "both weights must be scaled by expert or both by block": (
        "triton_quant_fp8_moe",
        ValueError,
        (
            X,
            IDS,
            WEIGHTS,
            FP8,
            FP8.mT.contiguous(),
            ONE,
            ONE,
            ONE,
            ONE,
            torch.ones(3),
            torch.ones(3, 1, 1),
            ONE,
            False,
            8,
        ),
    ),
    "routing_weights must be dense": (
        "torch_moe_dense_mlp",
        ValueError,
        (X, WEIGHTS, FIRST.mT, X, SECOND.mT, X),
    ),
}


@pytest.mark.parametrize("place,label", [(1, "selected_experts"), (2, "routing_weights"), (4, "the second stacked")])
def test_the_error_names_what_lies_on_another_device(place, label):
    args = [X, IDS, WEIGHTS, FIRST, SECOND]
    args[place] = args[place].to("meta")
    with pytest.raises(ValueError, match=f"torch_moe_fused: {label}.* lies on meta, the tokens on cpu"):
        torch_moe_fused(*args)  # the function itself: the dispatcher would take its fake


@pytest.mark.parametrize("text", CASES)
def test_the_error_names_what_is_wrong(text):
    name, error, args = CASES[text]
    with pytest.raises(error, match=text) as caught:
        getattr(OPS, name)(*args)
    assert name in str(caught.value)
