"""Models that cannot run are refused in one sentence that says what was found and what is missing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import generate, write

from shardwise.comm.rank import current_groups
from shardwise.launch.cli import main
from shardwise.parallel.engine import Engine
from shardwise.parallel.supported import UnsupportedModel
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import require_files
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", "llama", num_hidden_layers=2)


def change_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def unknown_architecture(folder):
    change_config(folder, architectures=["WondrousForCausalLM"], model_type="wondrous")


def unknown_quantisation(folder):
    change_config(folder, quantization_config={"quant_method": "aqlm"})


def without_a_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def with_a_wrong_shape(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def without_files(folder):
    (folder / "model.safetensors").unlink()


def without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            unknown_architecture,
            ["WondrousForCausalLM can be planned but not run", "recognised and cut: down, gate, up, k, o, q, v"],
        ),
        (
            unknown_quantisation,
            ['quant_method is "aqlm"', "expected awq or compressed-tensors or fbgemm_fp8 or fp8 or gptq"],
        ),
        (without_a_tensor, ["tensors of LlamaForCausalLM are missing (1): model.layers.1.mlp.up_proj.weight"]),
        (with_a_wrong_shape, ["model.norm.weight has shape [7], the config says [48]"]),
        (without_files, ["no model.safetensors, no model.safetensors.index.json"]),
        (without_a_tokenizer, ["tokenizer.json is missing (other tokenizer formats are not supported)"]),
    ],
)
def test_run_says_what_was_found_and_what_is_missing_before_any_rank_starts(folder, monkeypatch, capfd, spoil, words):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    spoil(folder)
    assert main(["run", str(folder), "--raw", "--device", "cpu", "--tp", "2"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("shardwise: error: ") and err.count("\n") == 1
    assert all(each in err for each in words), err


def test_float8_without_scales_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update({PROJECTION: tensors[PROJECTION].to(torch.float8_e4m3fn)}))
    words = (
        r"layer 1: model.layers.1.mlp.up_proj.weight is stored as F8_E4M3, which the runtime does not read; it reads"
    )
    with pytest.raises(UnsupportedModel, match=words):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))


def test_factors_of_inputs_are_refused_and_not_left_out(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(80)}))
    with pytest.raises(UnsupportedModel, match=r"model.layers.0.mlp.act.scales scales a layer's input, which"):
        run_threads(1, lambda: Engine(folder, plan(folder), current_groups()))


def test_a_model_without_any_tokenizer_answers_to_token_ids(folder):
    (with_words,) = generate(folder, ParallelLayout())
    without_a_tokenizer(folder)
    require_files(folder)
    (answers,) = generate(folder, ParallelLayout())
    assert [each.token_ids for each in answers] == [each.token_ids for each in with_words]
    assert all(each.text == "" for each in answers)
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        generate(folder, ParallelLayout(), prompts=["a text"])


def test_a_model_with_another_kind_of_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        require_files(folder)
