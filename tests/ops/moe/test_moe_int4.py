"""Experts with weights that stay 4-bit integers against float64: grouped products, and those of the decode step."""

import pytest
import torch
from oracles_moe import relative

from shardwise.ops.moe.decode import Choice, Gate, SharedExpert, expert_down, expert_up
from shardwise.ops.moe.int4 import Tile, grouped_int4_experts
from shardwise.ops.quantization.int4_weight import Int4Stack, pack_int4
from shardwise.ops.triton_support import interpreting
from shardwise.partition import extent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU")
TYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
MOST = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
GROUPINGS = {
    "32": (32, torch.bfloat16, 160, 96),
    "64": (64, torch.float16, 192, 64),
    "128": (128, torch.bfloat16, 640, 128),
}
"""Columns that share a scale, its type, hidden size and inner size of an expert."""
TILES = [Tile(4, 4, 2)] if DEVICE == "cpu" else [None, Tile(2, 16, 3)]
"""Few of the interpreter's slow programs; None: as the runtime runs them."""


def stack(experts, rows, columns, group, scale_dtype):
    """Matrices that have every code and zero point, and their values in float64."""
    groups, rows = columns // group, experts * rows
    codes, zeros = (torch.randint(0, 16, (rows, n), dtype=torch.uint8) for n in (columns, groups))
    scales = ((0.5 + torch.rand(rows, groups)) * columns**-0.5 / 4).to(scale_dtype)
    values = (codes.double().unflatten(1, (groups, group)) - zeros[..., None]) * scales.double()[..., None]
    packed = Int4Stack(pack_int4(*(each.to(DEVICE) for each in (codes, scales, zeros))), experts)
    return packed, values.view(packed.shape).to(DEVICE)


def layer_of(grouping, experts=5):
    """Up and gate, and down: packed and in float64."""
    group, scale_dtype, hidden, size = GROUPINGS[grouping]
    return stack(experts, 2 * size, hidden, group, scale_dtype), stack(experts, hidden, size, group, scale_dtype)


def oracle(x, ids, weights, up_gate, down):
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64, device=DEVICE)
    for token, (experts, shares) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if 0 <= expert < len(up_gate):
                up, gate = (up_gate[expert] @ x[token].double()).chunk(2)
                out[token] += share * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("grouping", "tokens", "block"), [("32", 2, None), ("128", 10, 8), ("64", 20, 16), ("32", 40, 32)]
)
def test_sums_over_chosen_experts_are_those_of_the_values(grouping, tokens, block, tile, dtype):
    torch.manual_seed(0)
    (up_gate, wide_up_gate), (down, wide_down) = layer_of(grouping)
    x = torch.randn(tokens, up_gate.shape[2], device=DEVICE).to(dtype)
    ids = torch.tensor([[3, 0, 9], [-1, 3, 1]] + [[1, 3, -1]] * (tokens - 2), device=DEVICE)  # of other ranks: 9 and -1
    weights = torch.rand(tokens, 3, device=DEVICE)
    got = grouped_int4_experts(x, ids, weights, up_gate, down, block=block, tile=tile)
    assert got.dtype == dtype
    assert relative(got, oracle(x, ids, weights, wide_up_gate, wide_down)) < MOST[dtype]


@pytest.mark.parametrize("choice", [Choice(3, True), Choice(1, False, 2.5)], ids=str)
@pytest.mark.parametrize("grouping", ["64"])
def test_ranks_that_choose_from_logits_sum_to_the_layer(grouping, choice, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr("shardwise.ops.moe.decode.INT4_UP_TILE", Tile(8, 4, 1))
        monkeypatch.setattr("shardwise.ops.moe.decode.INT4_DOWN_TILE", Tile(4, 8, 1))
    torch.manual_seed(1)
    experts, dtype = 4, TYPES[-1]
    (up_gate, wide_up_gate), (down, wide_down) = layer_of(grouping, experts)
    x, logits = torch.randn(2, up_gate.shape[2], device=DEVICE).to(dtype), torch.randn(2, experts, device=DEVICE)
    residual = torch.randn(2, down.shape[1], device=DEVICE)
    total = torch.zeros_like(residual)
    for rank in range(2):
        first, stop = extent(experts, 2, rank)
        slots = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
        slots[first:stop] = torch.arange(stop - first, dtype=torch.int32, device=DEVICE)
        routed = expert_up(x, logits, slots, choice, part(up_gate, first, stop), Gate())
        total += expert_down(
            routed, part(down, first, stop), residual=residual if rank == 0 else None, dtype=torch.float32
        )
    shares, ids = logits.double().softmax(-1).topk(choice.top_k)
    shares = choice.scale * (shares / shares.sum(-1, keepdim=True) if choice.normalize else shares)
    assert relative(total, oracle(x, ids, shares, wide_up_gate, wide_down) + residual) < MOST[dtype]


def part(stacked, first, stop):
    """Some of the matrices."""
    weight, (experts, rows, columns) = stacked.weight, stacked.shape
    words, scales = (
        each.unflatten(0, (experts, -1))[first:stop].flatten(0, 1) for each in (weight.words, weight.scales)
    )
    shape = ((stop - first) * rows, columns)
    return Int4Stack(type(weight)(words, scales, shape, weight.group, weight.scale_dtype), stop - first)


def test_stacks_are_written_out_matrix_by_matrix():
    (up_gate, wide), _ = layer_of("64", experts=2)
    got = up_gate.widened(torch.empty(up_gate.shape, dtype=torch.float32, device=DEVICE))
    assert torch.equal(got, wide.float())


def test_what_the_kernels_do_not_take_is_said():
    (up_gate, wide), (down, wide_down) = layer_of("64", experts=2)
    x = torch.randn(1, 192, device=DEVICE).half()
    with pytest.raises(ValueError, match="expert_up: 17 experts a token, at most 16"):
        slots = torch.zeros(32, dtype=torch.int32, device=DEVICE)
        expert_up(x, torch.randn(1, 32, device=DEVICE), slots, Choice(17, True), up_gate, Gate())
    assert not SharedExpert(wide[0], wide_down[0]).fits(up_gate, down)
