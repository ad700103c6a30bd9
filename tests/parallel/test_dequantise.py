"""Weights in quantisers' forms: each rank's part is the part of the weight that the format's definition means."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored_forms import FORMS

from shardwise.parallel.dequantise import PIECE_VALUES
from shardwise.parallel.weights import Weights
from shardwise.sharding.checkpoint.merge import merge_shards
from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.checkpoint.shard import write_shards
from shardwise.sharding.plan import plan

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "vocab_size": 40,
    "torch_dtype": "float32",
}
ROW = ("o", "down")
"""Roles whose inputs are cut."""
ROLES = ("q", "k", "v", "gate", "up", *ROW)


def write(folder, form, config=CONFIG):
    """A checkpoint whose linear layers have this form. Returns {module: the weight that is meant}."""
    rng, tensors, plain = np.random.default_rng(3), {}, {}
    config = config | {"quantization_config": form.section}
    for shard in plan({k: v for k, v in config.items() if k != "quantization_config"}).shards(0):
        module = shard.name.removesuffix(".weight")
        if shard.name.endswith("proj.weight"):
            stored, plain[module] = form.store(rng, *shard.global_shape)
            tensors |= {module + suffix: tensor.contiguous() for suffix, tensor in stored.items()}
        else:
            tensors[shard.name] = torch.zeros(shard.global_shape)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def parts(folder, *roles: str, dtype=torch.float32, device="cpu", **layout) -> list[list[torch.Tensor]]:
    """What each rank holds of some weights, for each of them."""
    made = plan(folder, **layout)
    checkpoint, blocks = open_checkpoint(folder), made.model.layers[0].blocks
    of_role = [next(block for block in blocks if f"{role}.weight" in block.roles) for role in roles]
    ranks = [
        Weights(checkpoint, made, rank, dtype=dtype, device=torch.device(device)) for rank in range(made.layout.world)
    ]
    return [[w.linear(block, role, layer=0) for w in ranks] for role, block in zip(roles, of_role, strict=True)]


def weight_of(plain, role: str) -> torch.Tensor:
    return next(weight for module, weight in plain.items() if module.endswith(f".{role}_proj"))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parts_of_all_ranks_are_the_weight(tmp_path, form):
    plain = write(tmp_path, form)
    for tp in (1, 2, 3, 4):  # on 3 and 4 ranks cuts are uneven, and on 4 heads share groups of 32
        for role, held in zip(ROLES, parts(tmp_path, *ROLES, tp=tp), strict=True):
            assert torch.equal(torch.cat(held, int(role in ROW)), weight_of(plain, role)), (role, tp)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_gpu_reads_ahead_and_dequantises_what_the_cpu_does(tmp_path, form):
    plain = write(tmp_path, form)
    for role, held in zip(ROLES, parts(tmp_path, *ROLES, tp=3, device="cuda"), strict=True):
        assert torch.equal(torch.cat(held, int(role in ROW)).cpu(), weight_of(plain, role)), role


def test_a_weight_becomes_the_type_of_the_run_with_one_rounding(tmp_path):
    plain = write(tmp_path, FORMS["gptq"])
    for dtype in (torch.bfloat16, torch.float16):
        ((found,),) = parts(tmp_path, "down", dtype=dtype)
        assert found.dtype == dtype and torch.equal(found, weight_of(plain, "down").to(dtype))


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "int4 with zeros", "nvfp4"])
def test_pieces_are_the_whole(tmp_path, monkeypatch, name):
    monkeypatch.setitem(PIECE_VALUES, "cpu", 700)
    plain = write(tmp_path, FORMS[name])
    up, down = parts(tmp_path, "up", "down", tp=3)
    assert torch.equal(torch.cat(up), weight_of(plain, "up"))
    assert torch.equal(torch.cat(down, 1), weight_of(plain, "down"))


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "nvfp4"])
def test_files_of_single_ranks_hold_words_and_scales_of_their_parts(tmp_path, name):
    plain, out = write(tmp_path, FORMS[name]), tmp_path / "out"
    write_shards(plan(tmp_path, tp=3), open_checkpoint(tmp_path), out)
    for role, held in zip(ROLES, parts(out, *ROLES, tp=3), strict=True):
        assert torch.equal(torch.cat(held, int(role in ROW)), weight_of(plain, role)), role


@pytest.mark.parametrize("name", ["gptq v2, one group", "int8 packed, a row", "nvfp4 compressed"])
def test_padding_is_zero_though_codes_of_zero_are_not(tmp_path, name):
    plain = write(tmp_path, FORMS[name])
    for role, dim, held in zip(("up", "down"), (0, 1), parts(tmp_path, "up", "down", tp=3, pad=["mlp"]), strict=True):
        joined = torch.cat(held, dim)
        held, padding = joined.split([160, joined.shape[dim] - 160], dim)
        assert padding.numel() and not padding.any() and torch.equal(held, weight_of(plain, role))


def test_a_rank_may_hold_nothing_but_padding(tmp_path):
    plain = write(tmp_path, FORMS["mxfp4"])
    for role, dim, held in zip(("up", "down"), (0, 1), parts(tmp_path, "up", "down", tp=4, pad=["mlp"]), strict=True):
        assert [part.shape[dim] for part in held] == [64] * 4 and not held[3].any()  # 160 are 5 blocks of 32
        assert torch.equal(torch.cat(held, dim).narrow(dim, 0, 160), weight_of(plain, role))


@pytest.mark.parametrize("name", ["mxfp4", "gptq v2, one group"])
def test_files_of_single_ranks_may_hold_padding(tmp_path, name):
    plain, out = write(tmp_path, FORMS[name]), tmp_path / "out"
    write_shards(plan(tmp_path, tp=4, pad=["mlp"]), open_checkpoint(tmp_path), out)
    for role, dim, held in zip(("up", "down"), (0, 1), parts(out, "up", "down", tp=4, pad=["mlp"]), strict=True):
        joined = torch.cat(held, dim)
        held, padding = joined.split([160, joined.shape[dim] - 160], dim)
        assert torch.equal(held, weight_of(plain, role)) and not padding.any()
    merge_shards(out, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_groups_that_the_config_calls_ordered_but_are_not_are_refused_where_a_rank_lacks_them(tmp_path):
    plain = write(tmp_path, FORMS["gptq act-order"], CONFIG)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    for role, (whole,) in zip(ROLES, parts(tmp_path, *ROLES), strict=True):  # who has all groups needs no order
        assert torch.equal(whole, weight_of(plain, role))
    assert torch.equal(torch.cat(*parts(tmp_path, "up", tp=2)), weight_of(plain, "up"))
    with pytest.raises(ValueError, match=r"down_proj.g_idx: rows are not in the order .* set desc_act to true"):
        parts(tmp_path, "down", tp=2)
