"""Transformers' tp_plan dictionaries: written from plans that they can express, read for unknown architectures."""

import json

import numpy as np
import pytest
from published_models import model
from safetensors.numpy import save_file

from shardwise.launch.cli import main
from shardwise.sharding.config import ConfigError
from shardwise.sharding.plan import plan
from shardwise.sharding.tp_export import export_tp_plan
from shardwise.sharding.tp_styles import read_tp_plan

ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}


def test_a_dense_plan_in_styles():
    found = export_tp_plan(plan(model("Qwen/Qwen3-32B"), tp=8))
    mlp = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    assert found == {
        "model.embed_tokens": "embedding_rowwise",
        **{f"model.layers.*.self_attn.{name}": style for name, style in ATTENTION.items()},
        **{f"model.layers.*.mlp.{name}": style for name, style in mlp.items()},
        "lm_head": "colwise_gather_output",
    }


@pytest.mark.parametrize(
    ("name", "config", "layout"),
    [
        ("meta-llama/Meta-Llama-3.1-70B", "LlamaConfig", {"tp": 8}),
        ("Qwen/Qwen3-32B", "Qwen3Config", {"tp": 4}),
        ("Qwen/Qwen3-30B-A3B", "Qwen3MoeConfig", {"tp": 4}),
        ("Qwen/Qwen3-30B-A3B", "Qwen3MoeConfig", {"tp": 4, "ep": 4}),
        ("mistralai/Mixtral-8x7B-v0.1", "MixtralConfig", {"tp": 8}),
        ("mistralai/Mixtral-8x7B-v0.1", "MixtralConfig", {"tp": 8, "ep": 8}),
        ("zai-org/GLM-4.5", "Glm4MoeConfig", {"tp": 8}),
        ("openai/gpt-oss-20b", "GptOssConfig", {"tp": 8, "ep": 8}),
    ],
    ids=str,
)
def test_styles_are_those_that_transformers_itself_has_for_the_model(name, config, layout):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, config)
    plans = [theirs.base_model_tp_plan, theirs.base_model_ep_plan if "ep" in layout else None]
    expected = {glob: style for part in plans for glob, style in (part or {}).items()}
    found = {glob.removeprefix("model."): s for glob, s in export_tp_plan(plan(model(name), **layout)).items()}
    assert {glob: style for glob, style in found.items() if "experts" in glob} == {
        glob: style for glob, style in expected.items() if "experts" in glob
    }
    for glob in found.keys() & expected.keys() - {"embed_tokens"}:
        assert found[glob] == expected[glob], glob
    cut = {glob for glob, style in expected.items() if style in ("colwise", "rowwise")}
    missing = cut - found.keys()
    assert all(glob.startswith("layers.*.mlp.") for glob in missing), missing  # dense layers, which this model has not


def test_every_plan_of_transformers_can_be_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    for config in (
        "Llama4TextConfig",
        "Qwen3MoeConfig",
        "DeepseekV3Config",
        "GptOssConfig",
        "Phi3Config",
        "OlmoeConfig",
    ):
        theirs = getattr(transformers, config)
        for part in (theirs.base_model_tp_plan, theirs.base_model_ep_plan):
            file = tmp_path / "styles.json"
            file.write_text(json.dumps(part or {}))
            assert read_tp_plan(file) == (part or {})


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("HuggingFaceTB/SmolLM-135M", {"tp": 2}, "9 q_heads on 2 ranks are cut uneven"),
        ("Qwen/Qwen3-30B-A3B", {"tp": 8}, "4 kv_heads on 8 ranks are cut replicate"),
        ("microsoft/phi-4", {"tp": 2}, "parts of different axes"),
        ("openai/gpt-oss-20b", {"tp": 2}, "gate and up rows lie in turn"),
        ("openai/gpt-oss-20b", {"tp": 4, "ep": 2}, "dealt to 2 ranks and each is cut in 2"),
        ("Qwen/Qwen3-30B-A3B", {"tp": 2, "attn_dp": 2, "ep": 4}, "attn_dp 2: no tp_plan style"),
        ("Qwen/Qwen3-30B-A3B", {"tp": 4, "ep": 4, "redundant_experts": 4}, "redundant experts have no tp_plan style"),
    ],
)
def test_what_styles_cannot_say_is_refused(name, layout, words):
    with pytest.raises(ValueError, match=words):
        export_tp_plan(plan(model(name), **layout))


def unknown_model(folder):
    """A model whose MLP has names that nobody uses."""
    shapes = {"embed_tokens": (96, 32), "layers.0.ff.widen": (64, 32), "layers.0.ff.narrow": (32, 64)}
    save_file({f"model.{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["NobodyForCausalLM"], "hidden_size": 32}))
    return folder


def test_styles_cut_what_names_do_not_tell(tmp_path, capsys):
    folder = unknown_model(tmp_path)
    widen, narrow = "model.layers.0.ff.widen.weight", "model.layers.0.ff.narrow.weight"
    assert plan(folder, tp=2).shard(1, widen).whole
    styles = {"layers.*.ff.widen": "colwise", "layers.*.ff.narrow": "rowwise"}
    made = plan(folder, tp=2, tp_plan=styles)
    assert made.shard(1, widen).ranges == (((32, 64),), ((0, 32),))
    assert made.shard(1, narrow).ranges == (((0, 32),), ((32, 64),))
    file = tmp_path / "styles.json"
    file.write_text(json.dumps(styles))
    assert main(["plan", str(folder), "--tp", "2", "--tp-plan", str(file), "--export-tp-plan"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["model.layers.*.ff.widen"] == "colwise" and exported["model.layers.*.ff.narrow"] == "rowwise"


def test_a_glob_that_matches_nothing_is_said(tmp_path):
    folder = unknown_model(tmp_path)
    styles = {"layers.*.ff.widen": "colwise", "layers.*.ff": "gather", "layers.*.mlp.up_proj": "colwise"}
    notes = plan(folder, tp=2, tp_plan=styles).warnings
    assert [note for note in notes if "tp_plan" in note] == [
        "the tp_plan's layers.*.mlp.up_proj matches no module of the checkpoint"
    ]


def test_a_described_architecture_takes_no_styles(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    with pytest.raises(ValueError, match="LlamaForCausalLM is described by a family"):
        plan(config, tp_plan={"*": "colwise"})


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "expected an object"), ('{"a": "sideways"}', "a is 'sideways', expected one of"), ("{", "not valid JSON")],
)
def test_a_file_that_is_no_tp_plan(text, words, tmp_path):
    path = tmp_path / "styles.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_tp_plan(path)
