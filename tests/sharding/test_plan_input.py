"""Configs that cannot describe a model, and checkpoints that contradict theirs, are refused by file and field."""

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from published_models import CONFIGS
from safetensors.numpy import save_file

from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.safetensors import read_safetensors_folder
from shardwise.sharding.config import ConfigError
from shardwise.sharding.cutting import IllegalLayout
from shardwise.sharding.families import UnknownArchitecture
from shardwise.sharding.plan import plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "torch_dtype": "float32",
}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", "64", 'hidden_size / n_embd is "64", expected an integer'),
        ("hidden_size", -64, "expected an integer from 1"),
        ("hidden_size", True, "expected an integer"),
        ("hidden_size", 1e30, "expected an integer from 1"),
        ("hidden_size", 65, "a multiple of num_attention_heads 4"),
        ("num_key_value_heads", 3, "a divisor of num_attention_heads 4"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", None, "num_hidden_layers is missing"),
        ("vocab_size", [100], "expected an integer"),
        ("torch_dtype", "int3", 'dtype / torch_dtype is "int3", expected bfloat16 or float16'),
        ("dtype", "auto", 'dtype / torch_dtype is "auto", expected bfloat16 or float16'),
        ("rms_norm_eps", "small", "expected a finite number"),
        ("rms_norm_eps", 10**400, "expected a finite number"),
        ("rms_norm_eps", -1e-6, "expected a number of at least 0"),
        ("tie_word_embeddings", "yes", "expected true or false"),
        ("rope_scaling", [1], "rope_scaling is [1], expected an object"),
        ("quantization_config", 8, "quantization_config is 8, expected an object"),
        ("architectures", "LlamaForCausalLM", "expected a list of str"),
        ("partial_rotary_factor", 1e308, "a number of at most 1"),
        ("hidden_size", {"__float__": [1]}, "expected an integer"),
        ("quantization_config", {"quant_method": "fp8", "modules_to_not_convert": ["re:("]}, "a regular expression"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(field, value, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {field: value}))
    with pytest.raises(ConfigError) as error:
        plan(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_pattern_without_layers_is_refused():
    config = CONFIGS["nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16"]
    with pytest.raises(ConfigError, match=r"layers_block_type is \[\], expected 1 of mamba"):
        plan(config | {"layers_block_type": []})


def test_a_rope_scaling_beyond_reason_is_refused():
    config = CONFIGS["deepseek-ai/DeepSeek-V3"]
    with pytest.raises(ConfigError, match="mscale_all_dim is 1e.308, expected a number of at most 1e.09"):
        plan(config | {"rope_scaling": config["rope_scaling"] | {"mscale_all_dim": 1e308}})


# Parameters when Transformers builds the published config without head_dim.
WITHOUT_HEAD_DIM = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "openai/gpt-oss-20b": 20_914_757_184,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31_577_940_288,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503(text)": 24_096_691_200,
}


@pytest.mark.parametrize("name", WITHOUT_HEAD_DIM)
def test_without_head_dim_the_default_of_the_architecture_holds(name):
    config = {key: value for key, value in CONFIGS[name].items() if key != "head_dim"}
    assert plan(config).parameters == WITHOUT_HEAD_DIM[name]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "num_experts"),
        ("ibm-granite/granite-4.0-h-small", "num_local_experts"),
    ],
)
def test_a_mixture_that_does_not_say_how_many_experts_is_not_taken_for_a_dense_model(name, field):
    config = CONFIGS[name]
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        plan({key: value for key, value in config.items() if key != field})
    dense = plan(config | {field: 0, "intermediate_size": 512})
    assert dense.parameters < plan(config).parameters and not dense.model.has_experts


def test_of_two_storage_types_the_newer_field_counts():
    assert plan(LLAMA | {"dtype": "bfloat16"}).ranks == plan(LLAMA | {"torch_dtype": "bfloat16"}).ranks


def test_without_a_storage_type_the_plan_says_what_it_counts():
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    assert plan(LLAMA).warnings == ()
    assert plan(config).warnings == (
        "the config has no torch_dtype: weights count as bfloat16 unless --dtype says otherwise",
    )
    assert plan(config, dtype="float32").ranks == plan(LLAMA).ranks


@pytest.mark.parametrize("field", ["hidden_size_per_layer_input", "num_kv_shared_layers"])
def test_what_a_family_leaves_out_is_refused(field):
    config = CONFIGS["google/gemma-4-26B-A4B"]
    assert plan(config).parameters > 0
    with pytest.raises(ConfigError, match=f"{field} is 4, expected 0: .* are not supported"):
        plan(config | {"text_config": config["text_config"] | {field: 4}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        (" \n", "is empty, expected one JSON object"),
        ("[1]", "holds a list"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply|not valid JSON"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": ' + "9" * 5000 + "}", "config.json"),
    ],
)
def test_files_that_are_no_config(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        plan(path)


@pytest.mark.parametrize("model", [None, 3, b"x", [LLAMA]])
def test_what_is_no_model_at_all_is_a_type_error(model):
    with pytest.raises(TypeError, match="give a path, a name, or a config as a dict"):
        plan(model)


WRONG = (None, 0, -1, 1.5, "x", "", [], [1], ["a"], {"a": 1}, True, 10**9, 10**20, float("inf"), float("nan"), [None])


def spoil(config, rng):
    """One field of the config, or of a nested object, removed or replaced by something wrong."""
    target = config
    while True:
        nested = [k for k, v in target.items() if isinstance(v, dict) and v and k != "_meta"]
        if not nested or rng.random() < 0.5:
            break
        target = target[rng.choice(nested)]
    key = rng.choice([k for k in target if k not in ("_meta", "architectures")])
    target[key] = rng.choice(WRONG)
    if rng.random() < 0.2:
        del target[key]


def test_spoiled_configs_plan_or_are_refused_in_words():
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        config = json.loads(json.dumps(CONFIGS[rng.choice(list(CONFIGS))]))
        spoil(config, rng)
        try:
            plan(config, tp=rng.choice([1, 2, 3]))
        except (ConfigError, IllegalLayout) as error:
            refused += 1
            assert len(str(error)) > 20
    assert refused > 100


def test_a_missing_file(tmp_path):
    with pytest.raises((ConfigError, FileNotFoundError), match=r"nowhere\.json"):
        plan(tmp_path / "nowhere.json")


def test_infinity_literals_are_read(tmp_path):
    path = tmp_path / "config.json"
    config = CONFIGS["nvidia/Nemotron-H-56B-Base-8K"]
    path.write_text(json.dumps(config))
    assert "Infinity" in path.read_text()
    assert plan(path).parameters == 56_324_350_464


def test_an_unknown_architecture_without_headers_names_the_closest():
    with pytest.raises(UnknownArchitecture, match="closest: LlamaForCausalLM") as error:
        plan(LLAMA | {"architectures": ["LLamaForCausalLM2"]})
    assert 'of the same build as a known one, name that in "architectures"' in str(error.value)


@pytest.mark.parametrize("redirected", [True, False], ids=["file", "pipe"])
def test_a_config_may_come_from_standard_input(redirected, tmp_path):
    path = tmp_path / "any"
    path.write_text(json.dumps(LLAMA))
    program = f"{sys.executable} -m shardwise plan - --tp 2 --json"
    command = f"{program} < {path}" if redirected else f"cat {path} | {program}"
    made = json.loads(subprocess.run(command, shell=True, capture_output=True, check=True, timeout=280).stdout)
    assert made["model"]["parameters"] == plan(LLAMA).parameters and made["model"]["name"] == "stdin"


def test_a_config_may_come_from_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_text, json.dumps(LLAMA))
        assert plan(tmp_path / "pipe").parameters == plan(LLAMA).parameters


def test_a_config_without_architectures_says_which_one_its_model_type_has():
    unnamed = LLAMA | {"architectures": None, "model_type": "qwen3_moe"}
    with pytest.raises(
        UnknownArchitecture, match=r'with this model_type add "architectures": \["Qwen3MoeForCausalLM"\]'
    ):
        plan(unnamed)


def test_placing_experts_of_a_dense_model_is_refused():
    for asked in ({"redundant_experts": 2}, {"expert_load": (1.0,)}):
        with pytest.raises(ValueError, match="the model has no routed experts"):
            plan(LLAMA, **asked)


def write_llama(folder, change=lambda tensors: None, config=LLAMA):
    tensors = {s.name: np.zeros(s.global_shape, np.float32) for s in plan(LLAMA).shards(0)}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_storage_types_come_from_the_headers(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def half(tensors):
        tensors[name] = tensors[name].astype(np.float16)

    made = plan(write_llama(tmp_path, half))
    assert made.shard(0, name).dtype == "F16"
    assert made.shard(0, name.replace("1", "0", 1)).dtype == "F32"
    assert len(made.model.layer_groups()) == 2


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensors of LlamaForCausalLM are missing \(1\): model\.norm\.weight"):
        plan(write_llama(tmp_path, lambda tensors: tensors.pop("model.norm.weight")))


def test_a_shape_that_contradicts_the_config_is_named(tmp_path):
    def shorten(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:50]

    shapes = r"has shape \[50, 64\], the config says \[100, 64\]"
    with pytest.raises(CheckpointError, match=f"model.safetensors: lm_head.weight {shapes}"):
        plan(write_llama(tmp_path, shorten))


def test_unused_tensors_are_extras_and_counted_nowhere(tmp_path):
    def add(tensors):
        tensors["visual.patch.weight"] = np.zeros((4, 4), np.float32)
        tensors["model.layers.0.strange"] = np.zeros(3, np.float32)

    made = plan(write_llama(tmp_path, add))
    assert {e.name: len(e.tensors) for e in made.model.extras} == {"vision": 1, "other": 1}
    assert made.ranks[0].weight_bytes == plan(LLAMA).ranks[0].weight_bytes
    assert any("model.layers.0.strange" in w for w in made.warnings)


def test_an_unknown_architecture_plans_from_names_and_shapes(tmp_path):
    unknown = LLAMA | {"architectures": ["NobodyForCausalLM"]}
    made = plan(write_llama(tmp_path, config=unknown), tp=2)
    known = plan(LLAMA, tp=2)
    assert [r.weight_bytes for r in made.ranks] == [r.weight_bytes for r in known.ranks]
    assert [r.kv_bytes_per_token for r in made.ranks] == [r.kv_bytes_per_token // 1 for r in known.ranks]
    for shard in made.shards(1):
        assert shard.ranges == known.shard(1, shard.name).ranges
    assert any("NobodyForCausalLM" in w and "recognised" in w for w in made.warnings)


def test_experts_of_an_unknown_architecture_are_counted_group_by_group(tmp_path):
    """Eight in one tensor, three with tensors and biases of their own, two that every token goes to."""

    def add(tensors):
        for layer in range(2):
            base = f"model.layers.{layer}"
            tensors[f"{base}.mlp.experts.gate_up_proj"] = np.zeros((8, 20, 64), np.float32)
            tensors[f"{base}.mlp.shared_experts.down_proj"] = np.zeros((2, 64, 10), np.float32)
            for expert in range(3):
                for name, shape in (("up_proj", (10, 64)), ("down_proj", (64, 10))):
                    tensors[f"{base}.side.experts.{expert}.{name}.weight"] = np.zeros(shape, np.float32)
                    tensors[f"{base}.side.experts.{expert}.{name}.bias"] = np.zeros(shape[:1], np.float32)

    folder = write_llama(tmp_path, add, LLAMA | {"architectures": ["NobodyForCausalLM"]})
    stored = {name: entry.nbytes for name, entry in read_safetensors_folder(folder).items()}
    assert {s.name: s.nbytes for s in plan(folder).shards(0)} == stored
    split = plan(folder, tp=2, ep=2)
    held = [{s.name: s.local_shape for s in split.shards(rank)} for rank in range(2)]
    shared, side = "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.side.experts.{}.up_proj.bias"
    assert [h[shared] for h in held] == [(2, 64, 10)] * 2
    assert [[i for i in range(3) if side.format(i) in h] for h in held] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((3,), "is there 1 times as F32 [10, 64], but numbered up to 3"), ((0, 2), "2 times"), ((99999,), "up to 99999")],
)
def test_experts_of_an_unknown_architecture_with_gaps_are_refused(numbers, words, tmp_path):
    def add(tensors):
        for number in numbers:
            tensors[f"model.layers.1.mlp.experts.{number}.up_proj.weight"] = np.zeros((10, 64), np.float32)

    folder = write_llama(tmp_path, add, LLAMA | {"architectures": ["NobodyForCausalLM"]})
    with pytest.raises(CheckpointError) as error:
        plan(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("number", ["999999999", "9" * 5000, "007"])
def test_a_number_that_no_layer_has_is_a_name_like_any_other(number, tmp_path):
    name = f"model.layers.{number}.mlp.experts.{number}.weight"

    def add(tensors):
        tensors[name] = np.zeros((10, 64), np.float32)

    made = plan(write_llama(tmp_path, add, LLAMA | {"architectures": ["NobodyForCausalLM"]}), tp=2)
    assert made.shard(1, name).whole and len(made.model.layers) == 2
    known = plan(write_llama(tmp_path, add))
    assert [t.name for extra in known.model.extras for t in extra.tensors] == [name]


def test_what_is_not_recognised_is_whole_and_said(tmp_path):
    def rename(tensors):
        for layer in range(2):
            base = f"model.layers.{layer}.mlp"
            tensors[f"{base}.squeeze.weight"] = tensors.pop(f"{base}.down_proj.weight")

    unknown = LLAMA | {"architectures": ["NobodyForCausalLM"]}
    folder = tmp_path
    write_llama(folder, rename, unknown)
    made = plan(folder, tp=2)
    for part in ("squeeze", "up_proj", "gate_proj"):
        assert made.shard(1, f"model.layers.0.mlp.{part}.weight").whole
    assert any("squeeze" in w and "no linear layer that is known" in w for w in made.warnings)
    assert any("up_proj" in w and "the matrices around it are not known" in w for w in made.warnings)
    assert sum(s.nbytes for s in plan(folder).shards(0)) == plan(LLAMA).ranks[0].weight_bytes


def test_a_quantisation_file_beside_the_config_counts(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    plain = plan(path)
    quantized = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantized))
    packed = plan(path)
    assert packed.model.quantization == "nvfp4"
    assert packed.parameters == plain.parameters and packed.ranks[0].weight_bytes < plain.ranks[0].weight_bytes


@pytest.mark.parametrize(("file", "name"), [("phi.json", "phi"), ("config.json", "model-folder")])
def test_a_model_has_the_name_of_its_config_or_of_the_folder_around_it(tmp_path, file, name):
    path = tmp_path / "model-folder" / file
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIGS["microsoft/phi-4"]))
    assert plan(path).model.name == name


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("hidden_size", 3, "a divisor of hidden_size 3"), ("num_attention_heads", 4, "n_heads_in_group is 8, expected")],
)
def test_heads_of_a_searched_architecture_that_do_not_divide_are_named(field, value, words):
    with pytest.raises(ConfigError, match=words):
        plan(CONFIGS["nvidia/Llama-3_3-Nemotron-Super-49B-v1"] | {field: value})
