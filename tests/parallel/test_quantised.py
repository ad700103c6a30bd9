"""Checkpoints whose weights are stored with scales: the same tokens as from the weights that they stand for."""

import json
import math
import re
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_forms import FORMS, packed
from tiny import NEW_TOKENS, PROMPTS, expected_tokens, generate, write

from shardwise.comm.rank import current_groups
from shardwise.ops.quantization.mxfp4 import dequantize_mxfp4
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

BLOCK = 16


def rewrite(folder, change, quantization: dict):
    """`change(name, tensor)` -> ({name: tensor to store}, tensor that is meant). Returns the tokens of the latter."""
    file = folder / "model.safetensors"
    stored, plain = {}, {}
    for name, tensor in load_file(file).items():
        parts, plain[name] = change(name, tensor)
        stored |= parts
    save_file(plain, file, metadata={"format": "pt"})
    expected = expected_tokens(folder)
    save_file({n: t.contiguous() for n, t in stored.items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization or None}))
    return expected


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and "layers" in name and "gate.weight" not in name


def fp8_tiles(name, tensor):
    if not is_linear(name, tensor):
        return {name: tensor}, tensor
    rows, columns = tensor.shape
    tiles = torch.nn.functional.pad(tensor, (0, -columns % BLOCK, 0, -rows % BLOCK)).unfold(0, BLOCK, BLOCK)
    scale = tiles.unfold(1, BLOCK, BLOCK).abs().amax((-1, -2)) / 448
    wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    weight = (tensor / wide).to(torch.float8_e4m3fn)
    return {name: weight, name + "_scale_inv": scale}, weight.float() * wide


def fp8_tensor(name, tensor):
    if not is_linear(name, tensor):
        return {name: tensor}, tensor
    scale = tensor.abs().max() / 448
    weight = (tensor / scale).to(torch.float8_e4m3fn)
    return {name: weight, name + "_scale": scale}, weight.float() * scale


def mxfp4_experts(name, tensor):
    """gpt-oss: [E, in, out] becomes blocks [E, out, in / 32, 16] and scales [E, out, in / 32]."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}, tensor
    experts, inner, out = tensor.shape
    blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8)
    scales = torch.randint(123, 126, (experts, out, inner // 32), dtype=torch.uint8)
    plain = dequantize_mxfp4(blocks, scales, torch.float32).transpose(1, 2).contiguous()
    return {name + "_blocks": blocks, name + "_scales": scales}, plain


def in_forms(forms: dict[str, str]) -> Callable:
    """Linear layers whose module matches a pattern have the form of that name."""

    def change(name, tensor):
        module = name.removesuffix(".weight")
        form = next((FORMS[form] for pattern, form in forms.items() if re.match(pattern, module)), None)
        if form is None or not is_linear(name, tensor):
            return {name: tensor}, tensor
        stored, plain = form.store(np.random.default_rng(zlib.crc32(name.encode())), *tensor.shape)
        return {module + suffix: part for suffix, part in stored.items()}, plain

    return change


def compressed_groups(forms: dict[str, str]) -> dict:
    """A group of compressed-tensors for each pattern."""
    groups = {}
    for number, (pattern, name) in enumerate(forms.items()):
        section = FORMS[name].section
        weights = section["config_groups"]["all"]["weights"]
        groups[f"group_{number}"] = {"targets": [f"re:{pattern}"], "format": section["format"], "weights": weights}
    return packed() | {"format": "mixed-precision", "config_groups": groups}


INTEGERS = {".*[qk]_proj": "int4", ".*v_proj": "int4 with zeros", ".*o_proj": "int4 act-order"}
IN_GROUPS = INTEGERS | {".*gate_proj": "int8 with zeros", ".*up_proj": "fp8 a row", ".*down_proj": "nvfp4 compressed"}
IN_RULES = {".*o_proj": "gptq act-order", ".*": "gptq"}
RULES = {r"+:.*o_proj": {"desc_act": True}}
LLAMA_LAYOUTS = [ParallelLayout(tp=n) for n in (1, 2, 3)]
MOE_LAYOUTS = [ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(tp=2, moe_ep=2), ParallelLayout(tp=3, moe_ep=3)]
TILES = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
CASES = {
    "fp8 tiles": ("llama", {}, fp8_tiles, TILES, LLAMA_LAYOUTS),
    "fp8 per tensor": ("llama", {}, fp8_tensor, {"quant_method": "fp8"}, LLAMA_LAYOUTS),
    "fp8 tiles of experts": (
        "qwen3_moe",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True),
        fp8_tiles,
        TILES,
        MOE_LAYOUTS,
    ),
    "awq": ("llama", {}, in_forms({".*": "awq"}), FORMS["awq"].section, LLAMA_LAYOUTS),
    "gptq": ("qwen2", {}, in_forms(IN_RULES), FORMS["gptq"].section | {"dynamic": RULES}, LLAMA_LAYOUTS),
    "compressed-tensors": ("llama", {}, in_forms(IN_GROUPS), compressed_groups(IN_GROUPS), LLAMA_LAYOUTS),
    "nvfp4": ("phi3", {}, in_forms({".*": "nvfp4"}), FORMS["nvfp4"].section, LLAMA_LAYOUTS),
    "gptq experts": (
        "qwen3_moe",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True),
        in_forms({".*": "gptq v2, one group"}),
        FORMS["gptq v2, one group"].section,
        MOE_LAYOUTS,
    ),
    "mxfp4 experts": (
        "gpt_oss",
        dict(hidden_size=64, intermediate_size=64, num_local_experts=5, num_experts_per_tok=2),
        mxfp4_experts,
        MXFP4,
        MOE_LAYOUTS,
    ),
}


@pytest.mark.parametrize(("model_type", "fields", "change", "quantization", "layouts"), CASES.values(), ids=CASES)
def test_tokens_equal_those_of_the_weights_that_are_meant(
    tmp_path, parity, request, model_type, fields, change, quantization, layouts
):
    folder = write(tmp_path, model_type, seed=2, **fields)
    expected = rewrite(folder, change, quantization)
    for layout in layouts:
        parity(request.node.callspec.id, layout, "threads")
        for completions in generate(folder, layout):
            assert [list(c.token_ids) for c in completions] == expected, layout


@pytest.mark.parametrize("form", [None, "awq"])
def test_a_padded_fused_feed_forward_keeps_gates_and_ups_apart(tmp_path, form):
    folder = write(tmp_path, "phi3")
    expected = rewrite(folder, in_forms({".*": form} if form else {}), FORMS[form].section if form else {})
    made = plan(folder, tp=3, pad=["mlp"])  # 80 as 27 on each

    def rank():
        engine = Engine(folder, made, current_groups())
        return [list(c.token_ids) for c in engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS))]

    assert run_threads(3, rank, layout=made.layout) == [expected] * 3


def test_a_run_says_what_dequantising_costs(tmp_path):
    folder = write(tmp_path, "llama")
    rewrite(folder, in_forms({".*": "awq"}), FORMS["awq"].section)
    made = plan(folder, tp=2)
    shards = [shard for shard in made.shards(0) if shard.name.endswith(("qweight", "qzeros", "scales"))]
    stored = sum(shard.nbytes for shard in shards)
    held = sum(8 * math.prod(shard.local_shape) * 4 for shard in shards if shard.name.endswith("qweight"))
    told = run_threads(2, lambda: Engine(folder, made, current_groups()).stats().weights, layout=made.layout)[0]
    sizes = f"{held / 2**20:.1f} MiB of them dequantised from {stored / 2**20:.1f} MiB"
    assert told == f"float32 (weights native keeps packed what a layer takes); {sizes}"


def test_a_run_says_which_tensors_of_the_file_no_layer_has(tmp_path):
    folder = write(tmp_path, "llama")
    assert "left out" not in told_of(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.ones(8)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert told_of(folder) == (f"float32; left out, being no part of LlamaForCausalLM: 1 tensors, from headers: {name}")


def told_of(folder) -> str:
    return run_threads(1, lambda: Engine(folder, plan(folder), current_groups()).stats().weights)[0]
