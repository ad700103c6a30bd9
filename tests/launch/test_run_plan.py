"""`run --plan FILE` runs the plan's layout and refuses a checkpoint that the plan was not made for."""

import json
import subprocess
import sys

import pytest

from shardwise.launch.model_config import ModelConfig, plan_of, planned_sizes


def shardwise(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    assert shardwise("plan", "smollm2", "--tp", 2, "--json", file)[0] == 0
    return file


def test_the_plans_layout_is_run(plan_file):
    code, out, err = shardwise("run", "smollm2", "--plan", plan_file, "--max-new-tokens", 2, "--json")
    assert code == 0, err
    assert len(json.loads(out)["ranks"]) == 2


def test_a_plan_of_something_else_is_refused_before_ranks_start(plan_file, tmp_path):
    document = json.loads(plan_file.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**document, "hash": "0" * len(document["hash"])}))
    code, _, err = shardwise("run", "smollm2", "--plan", other)
    assert code == 2 and "hash" in err and "Traceback" not in err


def test_a_size_that_contradicts_the_plan_is_named(plan_file):
    sizes = planned_sizes(str(plan_file), tp=None, attn_dp=1, moe_tp=0, ep=1)
    assert sizes == {"tp": 2, "attn_dp": 1, "moe_tp": 2, "ep": 1}
    with pytest.raises(ValueError, match="tp 3 was asked for, but the plan .* has 2"):
        planned_sizes(str(plan_file), tp=3, attn_dp=1, moe_tp=0, ep=1)


def test_redundant_experts_are_refused_before_ranks_start(tmp_path):
    model = tmp_path / "mixtral"
    model.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 100,
        "torch_dtype": "float32",
    }
    (model / "config.json").write_text(json.dumps(config))
    file = tmp_path / "plan.json"
    code, _, err = shardwise("plan", model, "--tp", 2, "--ep", 2, "--redundant-experts", 2, "--json", file)
    assert code == 0, err
    with pytest.raises(ValueError, match="places 2 redundant experts"):
        plan_of(ModelConfig(model=str(model), plan=str(file)))
