"""The decode kernels of mixtures of experts against float64, with the routing that they do by themselves."""

import pytest
import torch
from oracles_moe import ALPHA, LIMIT, float8_stack, gpt_oss_layer, gpt_oss_oracle, relative

from shardwise.ops.moe.decode import Choice, Gate, SharedExpert, expert_down, expert_up, reason_against
from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
from shardwise.ops.quantization.float8 import Float8Weight
from shardwise.ops.triton_support import interpreting
from shardwise.partition import extent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU")
TOKENS = 3
PACKED = [(2, 672, 32), (1, 64, 288)]
"""(tokens, hidden, inner) whose first product takes a warp two or three turns of its loop, ending inside a tile of
columns; whose second product takes a warp two tiles. Few of the interpreter's slow programs each."""
ROWS = 48 if DEVICE == "cpu" else None
"""How many rows of the second product are computed, for its programs are all alike."""
if DEVICE == "cuda":
    PACKED += [(3, 96, 64), (3, 64, 160), (3, 704, 384)]
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # of what meets packed weights


def local_slots(experts: int, ranks: int, rank: int) -> torch.Tensor:
    first, stop = extent(experts, ranks, rank)
    slots = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
    slots[first:stop] = torch.arange(stop - first, dtype=torch.int32, device=DEVICE)
    return slots


def share_of(layer, ranks, rank):
    """A rank's packed experts of a gpt-oss layer."""
    part = slice(*extent(layer.router.shape[0], ranks, rank))
    up = pack_mxfp4(layer.gate_up[part], layer.gate_up_scales[part], layer.gate_up_bias[part], paired=True)
    return up, pack_mxfp4(
        layer.down[part, :ROWS], layer.down_scales[part, :ROWS], layer.down_bias[part, :ROWS], paired=False
    )


@pytest.mark.parametrize("tokens, hidden, size", PACKED)
@pytest.mark.parametrize("ranks, processors", [(1, 1), (2, 1000)], ids=["four warps", "two ranks, eight warps"])
def test_packed_experts_sum_to_the_layer(tokens, hidden, size, ranks, processors, monkeypatch):
    monkeypatch.setattr("shardwise.ops.moe.decode.multiprocessors", lambda device: processors)
    torch.manual_seed(3)
    layer = gpt_oss_layer(5, hidden, size, DEVICE)
    x = torch.randn(tokens, hidden, device=DEVICE).to(DTYPE)
    logits = x.float() @ layer.router.T + layer.router_bias
    residual = torch.randn(tokens, hidden, device=DEVICE)[:, :ROWS].contiguous()
    total = torch.zeros_like(residual)
    for rank in range(ranks):
        up, down = share_of(layer, ranks, rank)
        routed = expert_up(x, logits, local_slots(5, ranks, rank), Choice(2, True), up, Gate(ALPHA, LIMIT))
        total += expert_down(routed, down, residual=residual if rank == 0 else None, dtype=torch.float32)
    expected = gpt_oss_oracle(x.float(), layer, 2)[:, :ROWS] + residual
    assert relative(total, expected) < (1e-5 if DEVICE == "cpu" else 5e-3)


def test_packed_experts_with_large_scales_are_refused():
    layer = gpt_oss_layer(2, 64, 32, DEVICE)
    layer.gate_up_scales[:, 0] = 130
    up, _ = share_of(layer, 1, 0)
    x, logits = torch.randn(1, 64, device=DEVICE), torch.randn(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="packed weights of format wide; legal: narrow"):
        expert_up(x, logits, local_slots(2, 1, 0), Choice(1, True), up, Gate(ALPHA, LIMIT))


def plain_oracle(x, logits, choice, up_gate, down, bias, down_bias):
    scores = logits.double().softmax(-1)
    weights, ids = scores.topk(choice.top_k, dim=-1)
    if choice.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            both = up_gate[expert].double() @ x[token].double()
            both = both if bias is None else both + bias[expert].double()
            up, gate = both.chunk(2)
            y = down[expert].double() @ (torch.nn.functional.silu(gate) * up)
            y = y if down_bias is None else y + down_bias[expert].double()
            out[token] += choice.scale * weight * y
    return out


@pytest.mark.parametrize("choice", [Choice(3, True), Choice(2, False, 2.5), Choice(1, True), Choice(8, True)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_plain_experts_equal_float64(choice, biased):
    torch.manual_seed(5)
    experts, hidden, size = 11, 72, 40
    x, logits = torch.randn(TOKENS, hidden, device=DEVICE), torch.randn(TOKENS, experts, device=DEVICE)
    up_gate = torch.randn(experts, 2 * size, hidden, device=DEVICE) * hidden**-0.5
    down = torch.randn(experts, hidden, size, device=DEVICE) * size**-0.5
    bias = torch.randn(experts, 2 * size, device=DEVICE) if biased else None
    down_bias = torch.randn(experts, hidden, device=DEVICE) if biased else None
    routed = expert_up(x, logits, local_slots(experts, 1, 0), choice, up_gate, Gate(), bias=bias)
    got = expert_down(routed, down, bias=down_bias, dtype=torch.float32)
    assert relative(got, plain_oracle(x, logits, choice, up_gate, down, bias, down_bias)) < 1e-5


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "channels"])
def test_float8_experts_equal_float64(tiled):
    torch.manual_seed(6)
    experts, hidden, size, choice = 3, 144, 128, Choice(2, True)
    x, logits = torch.randn(TOKENS, hidden, device=DEVICE), torch.randn(TOKENS, experts + 1, device=DEVICE)
    up_codes, up_scales, up = float8_stack(experts + 1, 2 * size, hidden, tiled, DEVICE)
    down_codes, down_scales, down = float8_stack(experts + 1, hidden, size, tiled, DEVICE)
    stacks = Float8Weight(up_codes[:-1], up_scales[:-1]), Float8Weight(down_codes[:-1], down_scales[:-1])
    shared = SharedExpert(Float8Weight(up_codes[-1], up_scales[-1]), Float8Weight(down_codes[-1], down_scales[-1]))
    assert shared.fits(*stacks)
    routed = expert_up(x, logits, local_slots(experts, 1, 0), choice, stacks[0], Gate(), shared=shared)
    got = expert_down(routed, stacks[1], shared=shared, dtype=torch.float32)
    expected = plain_oracle(x, logits[:, :-1], choice, up, down, None, None)
    assert relative(got, expected + shared_oracle(x, logits[:, -1], up[-1], down[-1])) < 1e-5


def shared_oracle(x, logit, up_gate, down):
    gate, up = (up_gate.double() @ x.double().T).chunk(2)
    return logit.double().sigmoid()[:, None] * (down.double() @ (torch.nn.functional.silu(gate) * up)).T


def test_a_rank_sums_its_own_of_many_choices_and_a_gated_shared_expert():
    torch.manual_seed(7)
    experts, hidden, size, choice = 40, 24, 16, Choice(10, True)
    x, logits = torch.randn(TOKENS, hidden, device=DEVICE), torch.randn(TOKENS, experts + 1, device=DEVICE)
    up_gate = torch.randn(experts + 1, 2 * size, hidden, device=DEVICE) * hidden**-0.5
    down = torch.randn(experts + 1, hidden, size, device=DEVICE) * size**-0.5
    residual = torch.randn(TOKENS, hidden, device=DEVICE)
    first, stop = extent(experts, 2, 1)
    own = up_gate[first:stop].contiguous(), down[first:stop].contiguous()
    shared = SharedExpert(up_gate[-1], down[-1])
    assert shared.fits(*own) and not shared.fits(own[0], own[1][:, :, :8])
    routed = expert_up(x, logits, local_slots(experts, 2, 1), choice, own[0], Gate(), shared=shared)
    got = expert_down(routed, own[1], residual=residual, shared=shared, dtype=torch.float32)
    down[:first] = 0
    expected = plain_oracle(x, logits[:, :-1], choice, up_gate, down, None, None)
    expected += shared_oracle(x, logits[:, -1], up_gate[-1], down[-1])
    assert relative(got, expected + residual) < 1e-5


def test_a_shared_expert_is_one_of_the_most_choices():
    experts, hidden, size = 40, 24, 16
    x, logits = torch.randn(TOKENS, hidden, device=DEVICE), torch.randn(TOKENS, experts + 1, device=DEVICE)
    up_gate, down = torch.randn(2 * size, hidden, device=DEVICE), torch.randn(hidden, size, device=DEVICE)
    routed, shared = up_gate.expand(experts, -1, -1).contiguous(), SharedExpert(up_gate, down)
    with pytest.raises(ValueError, match="33 experts a token, at most 32"):
        expert_up(x, logits, local_slots(experts, 1, 0), Choice(32, True), routed, Gate(), shared=shared)


def test_equal_logits_choose_the_lowest_numbers():
    x = torch.randn(1, 32, device=DEVICE)
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]], device=DEVICE)
    weight = torch.randn(5, 16, 32, device=DEVICE)
    routed = expert_up(x, logits, local_slots(5, 1, 0), Choice(3, True), weight, Gate())
    assert routed.ids.tolist() == [[1, 3, 0]]
    assert torch.allclose(routed.weights, torch.tensor([[2.0, 2.0, 1.0]], device=DEVICE).softmax(-1))


def test_rows_of_padding_choose_nothing():
    x, logits = torch.randn(2, 32, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    up, down = torch.randn(4, 16, 32, device=DEVICE), torch.randn(4, 32, 8, device=DEVICE)
    positions = torch.tensor([-1, 7], dtype=torch.int32, device=DEVICE)
    routed = expert_up(x, logits, local_slots(4, 1, 0), Choice(2, True), up, Gate(), positions=positions)
    got = expert_down(routed, down, dtype=torch.float32)
    assert routed.ids[0].tolist() == [-1, -1] and not got[0].any() and got[1].any()


def test_what_the_kernels_cannot_hold_is_said():
    assert reason_against(512, 10) == ""
    assert reason_against(1024, 8) == "1024 experts, at most 512"
    assert reason_against(64, 33) == "33 experts a token, at most 32"
    assert reason_against(64, 10, 8) == "10 experts a token, at most 8"
