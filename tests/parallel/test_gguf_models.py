"""The same weights from a Hugging Face folder and from a GGUF file generate the same tokens."""

import json
import re

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from tiny import expected_tokens, generate, write

from shardwise.sharding.layout import ParallelLayout

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
FAMILIES = {
    "llama": ("llama", "llama", dict(tie_word_embeddings=True)),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", dict(attention_bias=False)),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True),
    ),
}


def gguf_name(name: str) -> str:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"
    module, kind = name.rsplit(".", 1)
    return f"{NAMES[module]}.{kind}"


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under GGUF names; those of a layer's experts become one with the expert first."""
    named: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        expert = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)_proj\.weight", name)
        if expert:
            stacks.setdefault(f"blk.{expert[1]}.ffn_{expert[3]}_exps.weight", {})[int(expert[2])] = tensor
        else:
            named[gguf_name(name)] = tensor
    return named | {name: torch.stack([by[i] for i in sorted(by)]) for name, by in stacks.items()}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the query and key rows of Llama models: the halves of a head take turns."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def convert(folder, path, architecture: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if architecture == "qwen3moe":
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * len(vocabulary))
    for name, tensor in stack_experts(load_file(folder / "model.safetensors")).items():
        array = tensor.numpy()
        if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
            array = interleave(array, config[f"num_{'attention' if 'attn_q' in name else 'key_value'}_heads"])
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("architecture", "model_type", "fields"), FAMILIES.values(), ids=FAMILIES)
def test_a_gguf_file_generates_what_its_folder_generates(tmp_path, architecture, model_type, fields):
    folder = write(tmp_path / "folder", model_type, seed=3, **fields)
    path = tmp_path / "model.gguf"
    convert(folder, path, architecture)
    expected = expected_tokens(folder)
    for layout in (ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(tp=3, moe_ep=3)):
        for completions in generate(path, layout):
            assert [list(c.token_ids) for c in completions] == expected, layout
