"""A GGUF file seen as a Hugging Face checkpoint: its metadata as a config, its tensors under Hugging Face names.

Supported: the architectures of `ARCHITECTURES`. llama.cpp stores the query and key rows of the Llama architecture with
the two halves of every head interleaved (row `2j + half` of a head is row `half * D/2 + j` here): `StoredTensor` says
so and the loader puts the rows back. Stacked experts appear as one tensor per expert.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from shardwise.sharding.checkpoint.gguf import GgufFile
from shardwise.sharding.checkpoint.header import CheckpointError, TensorEntry

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""GGUF's `general.architecture` -> (`model_type`, class) of the Hugging Face config."""

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint under its Hugging Face name."""

    entry: TensorEntry
    interleaved_head: int = 0
    """Head size D when the rows of each head are stored with their halves interleaved; 0: rows are in order."""


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """The Hugging Face config that says what the metadata says. CheckpointError names a missing or unknown field."""
    architecture = _field(file, "general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: general.architecture is {architecture!r}, supported from GGUF: {', '.join(ARCHITECTURES)}"
        )
    if _ROPE_FACTORS in file.tensors:
        raise CheckpointError(f"{file.path}: tensor {_ROPE_FACTORS}: rope frequency factors in GGUF are not supported")

    def field(name: str, default: Any = None) -> Any:
        return _field(file, f"{architecture}.{name}", default)

    heads, hidden = (_count(file, f"{architecture}.{name}") for name in ("attention.head_count", "embedding_length"))
    model_type, cls = ARCHITECTURES[architecture]
    config = {
        "architectures": [cls],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", hidden // heads),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "max_position_embeddings": field("context_length"),
        "vocab_size": _embedding(file).shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    _refuse_unsupported(file, architecture, config)
    if architecture == "qwen3moe":
        config |= {
            "num_experts": field("expert_count"),
            "num_experts_per_tok": field("expert_used_count"),
            "moe_intermediate_size": field("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
    return config


def gguf_tensors(file: GgufFile) -> dict[str, StoredTensor]:
    """The file's tensors under Hugging Face names, in file order. CheckpointError names a tensor without one."""
    config = gguf_config(file)
    head = config["head_dim"] if config["model_type"] == "llama" else 0
    tensors: dict[str, StoredTensor] = {}
    for entry in file.tensors.values():
        for name, part in _named(file, entry):
            pairs = head if name.endswith(("q_proj.weight", "k_proj.weight")) else 0
            tensors[name] = StoredTensor(part, pairs)
    return tensors


def _named(file: GgufFile, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    if entry.name in _GLOBAL:
        yield _GLOBAL[entry.name], entry
        return
    match = _BLOCK.fullmatch(entry.name)
    block, part, kind = match.groups() if match else ("", "", "")
    if part in _IN_BLOCK:
        yield f"model.layers.{block}.{_IN_BLOCK[part]}.{kind}", entry
    elif part in _STACKED and kind == "weight":
        count = entry.shape[0]
        each = entry.nbytes // max(1, count)
        for expert in range(count):
            own = entry._replace(shape=entry.shape[1:], offset=entry.offset + expert * each, nbytes=each)
            yield f"model.layers.{block}.mlp.experts.{expert}.{_STACKED[part]}.weight", own
    else:
        raise CheckpointError(
            f"{file.path}: tensor {entry.name} has no place in a {file.metadata['general.architecture']}"
        )


def _refuse_unsupported(file: GgufFile, architecture: str, config: dict[str, Any]) -> None:
    if architecture == "llama" and file.metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{file.path}: llama.expert_count: mixture-of-experts llama files are not supported")
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{file.path}: {architecture}.rope.scaling.type {scaling!r} is not supported from GGUF")
    rotated = file.metadata.get(f"{architecture}.rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise CheckpointError(
            f"{file.path}: {architecture}.rope.dimension_count {rotated} is not the head size {config['head_dim']}"
        )


def _embedding(file: GgufFile) -> TensorEntry:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    return file.tensors["token_embd.weight"]


def _count(file: GgufFile, key: str) -> int:
    value = _field(file, key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file.path}: metadata {key} is {str(value):.60}, expected an integer of at least 1")
    return value


def _field(file: GgufFile, key: str, default: Any = None) -> Any:
    value = file.metadata.get(key, default)
    if value is None:
        raise CheckpointError(f"{file.path}: metadata {key} is missing")
    return value
