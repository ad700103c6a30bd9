"""Float8 weights that stay so: the tokens of the weights that they stand for, in the engine as a GPU runs it."""

import pytest
import torch
from families import NEAR_KIN
from test_decode_step import OPTIONS, few_programs, fused, launches, tokens_of  # noqa: F401
from test_quantised import is_linear, rewrite
from tiny import PROMPTS, write

from shardwise.comm.rank import current_groups
from shardwise.ops.linear.float8 import FewTile, Tile
from shardwise.ops.moe import decode
from shardwise.ops.triton_support import interpreting
from shardwise.parallel.engine import Engine
from shardwise.parallel.float8_linear import Float8Experts, Float8Linear
from shardwise.parallel.layers import Linear
from shardwise.parallel.load_float8 import _tiles_in_order
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="the interpreter stands for a GPU here; see test_engine_gpu.py"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),
]
BLOCK = 128
TILES = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        }
    },
}
SIZES = dict(num_hidden_layers=1, hidden_size=128, intermediate_size=256, head_dim=32)
HEADS = dict(num_attention_heads=8, num_key_value_heads=8)
LLAMA = ("llama", SIZES | HEADS)
MOE = (
    "qwen3_moe",
    SIZES | HEADS | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True),
)
LATENT = (
    "deepseek_v3",
    SIZES
    | NEAR_KIN["deepseek_v3"][1]
    | dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=32,
        num_hidden_layers=2,
        moe_intermediate_size=128,
        intermediate_size=256,
        hidden_size=128,
        head_dim=64,
    ),
)


def float8_tiles(name, tensor):
    if not is_linear(name, tensor):
        return {name: tensor}, tensor
    rows, columns = tensor.shape
    padded = torch.nn.functional.pad(tensor, (0, -columns % BLOCK, 0, -rows % BLOCK))
    scale = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3)) / 448
    wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    weight = (tensor / wide).to(torch.float8_e4m3fn)
    return {name: weight, name + "_scale_inv": scale}, weight.float() * wide


def float8_channels(name, tensor):
    if not is_linear(name, tensor):
        return {name: tensor}, tensor
    scale = (tensor.abs().amax(1, keepdim=True) / 448).bfloat16()
    weight = (tensor / scale.float()).to(torch.float8_e4m3fn)
    return {name: weight, name + "_scale": scale}, weight.float() * scale.float()


def float8_tensor(name, tensor):
    if not is_linear(name, tensor):
        return {name: tensor}, tensor
    scale = tensor.abs().max() / 448
    weight = (tensor / scale).to(torch.float8_e4m3fn)
    return {name: weight, name + "_scale": scale}, weight.float() * scale


CASES = {
    "tiles": (*LLAMA, float8_tiles, TILES, ParallelLayout(), "128 x 128 tiles"),
    "tiles, tp 2": (*LLAMA, float8_tiles, TILES, ParallelLayout(tp=2), "128 x 128 tiles"),
    "channels": (*LLAMA, float8_channels, CHANNELS, ParallelLayout(), "output channels"),
    "a scale a tensor": (*LLAMA, float8_tensor, {"quant_method": "fp8"}, ParallelLayout(tp=2), "tensors"),
    "experts": (*MOE, float8_tiles, TILES, ParallelLayout(), "128 x 128 tiles"),
    "latent attention": (*LATENT, float8_tiles, TILES, ParallelLayout(), "128 x 128 tiles"),
    "latent attention, tp 2": (*LATENT, float8_tiles, TILES, ParallelLayout(tp=2), "128 x 128 tiles"),
    "experts, tp 2, ep 2": (*MOE, float8_tiles, TILES, ParallelLayout(tp=2, moe_ep=2), "128 x 128 tiles"),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes as long for a program whatever its tile."""
    monkeypatch.setattr("shardwise.ops.linear.float8.tile_for", lambda *args: Tile(64, 1))
    monkeypatch.setattr("shardwise.ops.linear.float8.few_tile_for", lambda *args: FewTile(128, 128, 4, 1, 1))
    for name in ("FLOAT8_UP_TILE", "FLOAT8_DOWN_TILE"):
        monkeypatch.setattr(f"shardwise.ops.moe.decode.{name}", decode.Tile(64, 1, 16))


@pytest.mark.parametrize(
    ("model_type", "fields", "change", "quantization", "layout", "grain"), CASES.values(), ids=CASES
)
def test_tokens_equal_those_of_the_values(tmp_path, model_type, fields, change, quantization, layout, grain):
    folder = write(tmp_path, model_type, seed=2, **fields)
    expected = [tokens[:3] for tokens in rewrite(folder, change, quantization)][:2]
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups(), **OPTIONS)
        layer = engine.decoder.layers[-1]
        for name in ("qkv", "down", "q_up", "out"):
            assert isinstance(getattr(layer.mixer, name, None), Float8Linear | None), name
        inner = getattr(layer.feed_forward, "routed", layer.feed_forward)
        assert isinstance(getattr(inner, "experts", None), Float8Experts) or isinstance(inner.gate_up, Float8Linear)
        stats = engine.stats()
        assert stats.weights.startswith(f"float8 with scales of {grain}")  # tiny weights may be one tile
        assert stats.decode == "fused step, kernel by kernel: asked for by name"
        return tokens_of(engine, PROMPTS[:2])

    assert all(found == expected for found in run_threads(layout.world, rank, layout=layout))


def test_gated_delta_layers_project_beta_and_decay_apart_where_these_stay_plain(tmp_path):
    kinds = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    sizes = kinds | dict(linear_key_head_dim=32, linear_value_head_dim=32)
    experts = dict(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    fields = NEAR_KIN["qwen3_next"][1] | SIZES | HEADS | sizes | experts
    folder = write(tmp_path, "qwen3_next", seed=2, **fields)

    def change(name, tensor):
        return ({name: tensor}, tensor) if "in_proj_ba" in name else float8_channels(name, tensor)

    quantization = CHANNELS | {"ignore": ["lm_head", "re:.*in_proj_ba"]}
    expected = [tokens[:3] for tokens in rewrite(folder, change, quantization)]
    engine = fused(folder)
    layer = engine.decoder.layers[0]
    assert list(map(type, layer.mixer.in_projs)) == [Float8Linear, Linear]
    assert isinstance(layer.feed_forward.routed.experts, Float8Experts)
    assert tokens_of(engine, PROMPTS[1:2]) == expected[1:2]


def test_long_prompts_go_by_plain_copies_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.parallel.float8_linear.MAX_FEW", 4)
    folder = write(tmp_path, LLAMA[0], seed=2, **LLAMA[1])
    expected = [tokens[:3] for tokens in rewrite(folder, float8_tiles, TILES)]
    assert tokens_of(fused(folder), PROMPTS[:1]) == expected[:1]


def test_weights_whose_tiles_are_cut_are_dequantised_and_others_stay(tmp_path):
    fields = SIZES | dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    folder = write(tmp_path, "llama", seed=2, **fields)
    expected = [tokens[:3] for tokens in rewrite(folder, float8_tiles, TILES)]
    engine = fused(folder)
    mixer = engine.decoder.layers[0].mixer
    assert isinstance(mixer.qkv, Linear) and isinstance(engine.decoder.layers[0].feed_forward.down, Float8Linear)
    assert tokens_of(engine, PROMPTS[:2]) == expected[:2]


def test_gates_and_ups_of_one_tensor_may_share_a_tile(tmp_path):
    folder = write(tmp_path, "phi3", seed=2, **SIZES | HEADS | dict(hidden_size=256, intermediate_size=192))
    expected = [tokens[:3] for tokens in rewrite(folder, float8_tiles, TILES)]
    engine = fused(folder)
    assert isinstance(engine.decoder.layers[0].feed_forward.gate_up, Float8Linear)
    assert tokens_of(engine, PROMPTS[:2]) == expected[:2]


def test_dequantised_weights_are_asked_for_by_name(tmp_path):
    folder = write(tmp_path, LLAMA[0], seed=2, **LLAMA[1])
    rewrite(folder, float8_tiles, TILES)
    engine = fused(folder, weights="dequantised")
    assert isinstance(engine.decoder.layers[0].mixer.qkv, Linear)
    assert engine.stats().weights.startswith("float32, asked for by name")


def test_rows_in_another_order_keep_their_scales_where_tiles_stay_together():
    heads = torch.arange(512).view(2, 2, 128)
    turned = heads.transpose(0, 1).flip(-1).reshape(-1)  # tiles 0, 2, 1, 3, each the other way round
    assert _tiles_in_order(turned).tolist() == [0, 2, 1, 3]
    assert _tiles_in_order(torch.arange(192)).tolist() == [0, 1]
    assert _tiles_in_order(torch.arange(256).view(2, -1).t().reshape(-1)) is None
