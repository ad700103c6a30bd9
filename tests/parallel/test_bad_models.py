"""Models that cannot run are refused in one sentence that says what was found and what is missing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import FP8, LLAMA
from tiny import write

from shardwise.comm.rank import current_groups
from shardwise.launch.cli import main
from shardwise.parallel.engine import Engine
from shardwise.parallel.supported import UnsupportedModel
from shardwise.sharding.checkpoint.resolve import random_checkpoint
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads


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


QUANTISED = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16}, "q_proj.qweight is stored as I32 with scales of F16"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "q_proj.qweight is stored as I32"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "q_proj.weight is stored as U8"),
    "mxfp8": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "stored as F8_E4M3 with scales of U8"),
    "int8": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}},
        },
        "stored as I8",
    ),
}


@pytest.mark.parametrize(("quantisation", "words"), QUANTISED.values(), ids=QUANTISED)
def test_forms_of_weights_that_are_not_read_are_refused_before_a_byte_is_loaded(tmp_path, quantisation, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"quantization_config": quantisation}))
    with pytest.raises(UnsupportedModel) as raised:
        run_threads(1, lambda: Engine(random_checkpoint(path), plan(path), current_groups()))
    assert words in str(raised.value) and "which the runtime does not read" in str(raised.value)


def test_float8_with_float_scales_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FP8))
    run_threads(1, lambda: Engine(random_checkpoint(path), plan(path), current_groups()))
