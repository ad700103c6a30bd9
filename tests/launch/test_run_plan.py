"""`run --plan FILE` runs the plan's layout and refuses a checkpoint that the plan was not made for."""

import json
import subprocess
import sys

import pytest

from shardwise.launch.llm import planned_sizes


def shardwise(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", *map(str, arguments)], capture_output=True, text=True, timeout=120
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
    assert code in (1, 2) and "hash" in err and "Traceback" not in err


def test_a_size_that_contradicts_the_plan_is_named(plan_file):
    assert planned_sizes(str(plan_file), tp=None, attn_dp=1, moe_tp=0, ep=1) == (2, 1, 2, 1)
    with pytest.raises(ValueError, match="--tp 3, but the plan .* has 2"):
        planned_sizes(str(plan_file), tp=3, attn_dp=1, moe_tp=0, ep=1)
