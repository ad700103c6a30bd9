"""The MXFP4 kernels: every code and scale bit by bit, layers against float64 and Transformers, expert parallelism."""

import functools
import weakref
from dataclasses import replace

import pytest
import torch
from oracles_moe import ALPHA, LIMIT, gpt_oss_layer, gpt_oss_oracle, relative

from shardwise.ops.moe.mxfp4 import mxfp4_moe
from shardwise.ops.moe.mxfp4_convert import dequantize_tile
from shardwise.ops.moe.mxfp4_layout import PackedOnce, pack_mxfp4, packed_once, row_order
from shardwise.ops.moe.mxfp4_plan import choose_plan
from shardwise.ops.moe.nvfp4 import pack_nvfp4
from shardwise.ops.moe.reference import mxfp4_moe_reference
from shardwise.ops.moe.tiles import Plan, Tiles
from shardwise.ops.quantization import nvfp4
from shardwise.ops.quantization.mxfp4 import dequantize_mxfp4
from shardwise.ops.triton_support import interpreting, tl, triton

OPS = torch.ops.auto_deploy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
# Inputs that a GPU need not round, so that both sides choose the same experts.
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
EXACT = 1e-5 if DEVICE == "cpu" else 5e-3  # float32 in the interpreter, bfloat16 products on a GPU


@triton.jit
def unpack_kernel(
    word_ptr,
    scale_ptr,
    out_ptr,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    LINE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One 64 x 64 tile a program, to float32 [64, 64]."""
    tile = tl.program_id(0)
    words = tl.load(word_ptr + tile * 512 + tl.arange(0, 512 // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :])
    scales = tl.load(scale_ptr + tile * 4 * SCALES + tl.arange(0, 4)[:, None] * SCALES + tl.arange(0, SCALES)[None, :])
    values = dequantize_tile(words, scales, 1, FORMAT, INTERPRET).to(tl.float32)
    tl.store(out_ptr + tile * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :], values)


def unpack(packed, line):
    experts, tiles_n, tiles_k = packed.words.shape[:3]
    count = experts * tiles_n * tiles_k
    out = torch.full((count, 64, 64), torch.nan, device=packed.words.device)
    scales = 16 if packed.format == "nvfp4" else 8
    unpack_kernel[(count,)](packed.words, packed.scales, out, packed.format, scales, line, interpreting())
    return out.view(experts, tiles_n, tiles_k, 64, 64).transpose(2, 3).reshape(experts, tiles_n * 64, tiles_k * 64)


def every_code(scales):
    """blocks [1, R, 2, 16], scales [1, R, 2]: all 16 codes under each given scale."""
    rows = (len(scales) + 1) // 2
    scales = torch.tensor([*scales, *scales[: 2 * rows - len(scales)]], dtype=torch.uint8).view(1, rows, 2)
    codes = torch.randperm(32)[None].repeat(rows * 2, 1) % 16
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(1, rows, 2, 16)
    return blocks.to(DEVICE), scales.to(DEVICE)


@pytest.mark.parametrize("line", [64, 128])
@pytest.mark.parametrize("scales,form", [(range(129), "narrow"), (range(256), "wide")])
def test_every_code_under_every_scale_is_exact(scales, form, line):
    blocks, scales = every_code(list(scales))
    rows = blocks.shape[1]
    packed = pack_mxfp4(blocks, scales, torch.zeros(1, rows, device=DEVICE), paired=False)
    assert packed.format == form
    got = unpack(packed, line)[0, :rows]
    wanted = dequantize_mxfp4(blocks, scales, torch.float32)[0]
    if DEVICE == "cuda":
        wanted = wanted.bfloat16().float()  # beyond bfloat16's range: infinity, as a rounding gives
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0.0), wanted.nan_to_num(0.0))


def test_nvfp4_tiles_are_exact():
    weight = torch.randn(2, 48, 80, device=DEVICE) * torch.logspace(-3, 2, 48, device=DEVICE)[None, :, None]
    pairs = [nvfp4.quantize_nvfp4(expert, nvfp4.nvfp4_global_scale(expert)) for expert in weight]
    codes = torch.stack([code for code, _ in pairs])
    swizzled = torch.stack([nvfp4.swizzle_scales(scale) for _, scale in pairs])
    got = unpack(pack_nvfp4("test", codes, swizzled, "plain"), 128)
    assert torch.equal(got[:, :48, :80], torch.stack([nvfp4.dequantize_nvfp4(*pair) for pair in pairs]))
    assert got[:, 48:].eq(0).all() and got[:, :, 80:].eq(0).all()
    with pytest.raises(ValueError, match="test: block scales"):
        pack_nvfp4("test", codes, swizzled[:, :-1], "plain")


def test_paired_rows_stand_eight_apart():
    order = row_order(40, 64, "alternating", torch.device("cpu")).tolist()
    assert order[:3] + order[8:11] == [0, 2, 4, 1, 3, 5] and order.count(40) == 24
    assert sorted(order)[:40] == list(range(40))
    stacked = row_order(40, 64, "stacked", torch.device("cpu")).tolist()
    assert stacked[:2] + stacked[8:10] == [20, 21, 0, 1] and sorted(stacked)[:40] == list(range(40))


def test_packing_happens_once_and_again_after_a_write():
    layer = gpt_oss_layer(2, 64, 32)
    parts = layer.down, layer.down_scales, layer.down_bias
    packed = packed_once(*parts, paired=False)
    assert packed_once(layer.down.view(layer.down.shape), *parts[1:], paired=False) is packed
    for changed in parts:
        changed.add_(1)
        assert packed_once(*parts, paired=False) is not packed
        packed = packed_once(*parts, paired=False)


def test_packing_follows_an_assignment_to_a_tensors_data():
    layer, other = gpt_oss_layer(2, 64, 32), gpt_oss_layer(2, 64, 32)
    beside, memory = (layer.down_scales, layer.down_bias), bytearray(layer.down.numel())
    weight = layer.down.clone()
    packed_once(weight, *beside, paired=False)
    for blocks in other.down, layer.down:
        weight.data = torch.empty(0, dtype=torch.uint8)
        memory[:] = blocks.numpy().tobytes()  # the same place each time, as an allocator may give it again
        weight.data = torch.frombuffer(memory, dtype=torch.uint8).view(blocks.shape)
        packed = packed_once(weight, *beside, paired=False)
        assert torch.equal(packed.words, pack_mxfp4(blocks, *beside, paired=False).words)


def test_weights_made_in_inference_mode_are_packed_again_when_their_data_is_assigned():
    kept = PackedOnce()
    with torch.inference_mode():
        weight, other = torch.zeros(4), torch.ones(4)
    for data in (weight.data, torch.full((4,), 2.0), other, torch.full((4,), 3.0)):
        weight.data = data
        for _ in range(2):
            assert torch.equal(kept.get((weight,), "", weight.clone), data)


def test_what_was_packed_of_weights_that_are_gone_is_given_back():
    made, kept = PackedOnce(), PackedOnce()
    weight, other = torch.zeros(4), torch.zeros(4)
    gone = weakref.ref(made.get((weight,), "", lambda: torch.zeros(4)))
    del weight
    kept.get((other,), "", lambda: None)
    assert gone() is None


def randn(*shape):
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


@functools.cache
def layer_of(experts, hidden, size):
    torch.manual_seed(11)
    return gpt_oss_layer(experts, hidden, size, DEVICE, DTYPE)


@pytest.mark.parametrize("tokens,top_k,hidden,size", [(1, 4, 96, 32), (5, 2, 64, 96), (21, 3, 96, 160)])
def test_a_layer_agrees_with_float64(tokens, top_k, hidden, size):
    layer, x = layer_of(6, hidden, size), randn(tokens, hidden)
    assert relative(OPS.triton_mxfp4_moe(x, *layer.arguments(top_k)), gpt_oss_oracle(x, layer, top_k)) < EXACT
    plain = mxfp4_moe_reference(x.float(), *layer.arguments(top_k))
    assert relative(plain, gpt_oss_oracle(x, layer, top_k)) < 1e-5


PLANS = [
    Plan(16, Tiles(64, 128, 4, 2, 1), Tiles(64, 64, 4, 2, 1, 2)),
    Plan(32, Tiles(128, 64, 4, 2, 2), Tiles(128, 128, 8, 2, 1, 3), 16),
    Plan(64, Tiles(128, 64, 4, 2, 2), Tiles(256, 64, 8, 2, 1), 16),
    Plan(16, Tiles(64, 64, 4, 2, 1), Tiles(64, 128, 4, 2, 1, 2), side=32),
]


@pytest.mark.parametrize("plan", PLANS, ids=["narrow", "wide", "wider", "beside"])
def test_every_tiling_gives_the_same_layer(plan):
    layer, x = layer_of(4, 192, 96), randn(39, 192)
    up = pack_mxfp4(layer.gate_up, layer.gate_up_scales, layer.gate_up_bias, paired=True)
    down = pack_mxfp4(layer.down, layer.down_scales, layer.down_bias, paired=False)
    got = mxfp4_moe(x, layer.router, layer.router_bias, 2, up, down, ALPHA, LIMIT, 0, plan)
    assert relative(got, gpt_oss_oracle(x, layer, 2)) < EXACT


def test_everything_but_the_codes_may_lie_apart():
    def apart(tensor):
        return torch.stack((tensor, torch.full_like(tensor, 77)), -1)[..., 0]

    layer, x = gpt_oss_layer(3, 96, 64, DEVICE, DTYPE), torch.randn(2, 96, device=DEVICE).to(DTYPE)
    names = ("router", "router_bias", "gate_up_bias", "gate_up_scales", "down_bias", "down_scales")
    moved = replace(layer, **{name: apart(getattr(layer, name)) for name in names})
    assert torch.equal(OPS.triton_mxfp4_moe(x, *moved.arguments(2)), OPS.triton_mxfp4_moe(x, *layer.arguments(2)))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_expert_parallel_sums_to_the_whole(ranks):
    layer, x = layer_of(9, 64, 32), randn(2, 3, 64)
    whole = OPS.triton_mxfp4_moe(x, *layer.arguments(3))
    parts = [
        OPS.triton_mxfp4_moe_ep(x, *layer.shard(ranks, rank).arguments(3), ranks, rank).double()
        for rank in range(ranks)
    ]
    assert relative(sum(parts), whole) < EXACT
    logits = x.flatten(0, 1).double() @ layer.router.double().T + layer.router_bias.double()
    ids = logits.topk(3).indices
    base = 0
    for rank, part in enumerate(parts):
        size = layer.shard(ranks, rank).gate_up.shape[0]
        foreign = ((ids < base) | (ids >= base + size)).all(dim=1)
        assert part.flatten(0, 1)[foreign].eq(0).all()
        base += size


@pytest.mark.parametrize("tokens", [0, 3, 37])
def test_all_tokens_to_one_expert(tokens):
    layer = layer_of(4, 64, 32)
    layer = replace(layer, router_bias=layer.router_bias + 1000 * (torch.arange(4, device=DEVICE) == 2))
    x = randn(tokens, 64)
    got, wanted = OPS.triton_mxfp4_moe(x, *layer.arguments(1)), gpt_oss_oracle(x, layer, 1)
    assert got.shape == x.shape
    if tokens:
        assert relative(got, wanted) < EXACT


@pytest.mark.parametrize("tokens", [4, 20])
def test_more_experts_chosen_than_a_rank_holds(tokens):
    layer, x = layer_of(3, 64, 32), randn(tokens, 64)
    parts = [OPS.triton_mxfp4_moe_ep(x, *layer.shard(8, rank).arguments(3), 8, rank) for rank in range(4)]
    assert relative(sum(parts), gpt_oss_oracle(x, layer, 3)) < EXACT
    assert parts[3].eq(0).all()


def test_transformers_gpt_oss_block_gives_the_same():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    layer, x = layer_of(6, 64, 32), randn(1, 7, 64)
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_local_experts=6, num_experts_per_tok=2, swiglu_limit=LIMIT
    )
    block = GptOssMLP(config).to(DEVICE, torch.float32)
    values = {
        "router.weight": layer.router,
        "router.bias": layer.router_bias,
        "experts.gate_up_proj": dequantize_mxfp4(layer.gate_up, layer.gate_up_scales, torch.float32).mT,
        "experts.gate_up_proj_bias": layer.gate_up_bias,
        "experts.down_proj": dequantize_mxfp4(layer.down, layer.down_scales, torch.float32).mT,
        "experts.down_proj_bias": layer.down_bias,
    }
    block.load_state_dict(values)
    with torch.no_grad():
        wanted = block(x.float())[0]
    assert relative(OPS.triton_mxfp4_moe(x, *layer.arguments(2)), wanted) < EXACT
    assert relative(mxfp4_moe_reference(x.float(), *layer.arguments(2)), wanted) < 1e-5


def test_a_nan_scale_reaches_the_tokens_of_its_expert_only():
    layer, x = gpt_oss_layer(4, 64, 32, DEVICE, DTYPE), randn(6, 64)
    layer.down_scales[1, 5, 0] = 255
    ids = (x.double() @ layer.router.double().T + layer.router_bias.double()).topk(2).indices
    got = OPS.triton_mxfp4_moe(x, *layer.arguments(2))
    hit = (ids == 1).any(dim=1)
    assert torch.equal(got.isnan().any(dim=1), hit) and hit.any() and not hit.all()


@pytest.mark.parametrize("pairs,experts", [(0, 4), (4, 128), (256, 128), (1024, 128), (4096, 64), (40000, 32)])
def test_plans_fit_one_multiprocessor(pairs, experts):
    plan = choose_plan(pairs, experts)
    for tiles in (plan.up, plan.down):
        stage = tiles.bn * tiles.bk // 2 + tiles.bn * tiles.bk // 32 + plan.bt * tiles.bk * 2
        assert tiles.per_sm * tiles.stages * stage <= 227 * 1024


def test_the_error_names_the_argument_that_does_not_fit():
    layer, x = layer_of(4, 64, 32), randn(2, 64)
    args = list(layer.arguments(2))
    for index, value, error, text in (
        (0, layer.router[:, :32], ValueError, r"router_weight must be \[4, 64\]"),
        (0, layer.router[0], ValueError, r"router_weight must be \[E, H\], got \[64\]"),
        (2, 5, ValueError, "top_k=5 of 4 experts; legal: 1 to the number"),
        (3, layer.gate_up[:3], ValueError, "gate_up: blocks"),
        (4, layer.gate_up_bias[:, :8], ValueError, r"gate_up_bias must be \[4, 64\]"),
        (5, layer.gate_up_scales.int(), TypeError, "must be uint8"),
        (8, layer.down[:, :8], ValueError, "down: blocks"),
    ):
        changed = args[:index] + [value] + args[index + 1 :]
        with pytest.raises(error, match=text) as caught:
            OPS.triton_mxfp4_moe(x, *changed)
        assert "triton_mxfp4_moe" in str(caught.value)
    with pytest.raises(ValueError, match="1 of 4 experts on rank 1 of 4"):
        OPS.triton_mxfp4_moe_ep(x, *args, 4, 1)
    with pytest.raises(ValueError, match="ep_rank=4 with ep_size=4; legal: 0 <= ep_rank < ep_size"):
        OPS.triton_mxfp4_moe_ep(x, *args, 4, 4)
    with pytest.raises(TypeError, match="hidden_states must be floating point, got torch.int32"):
        OPS.triton_mxfp4_moe(x.int(), *args)
