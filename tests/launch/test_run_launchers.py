"""The same tokens, whoever starts the ranks: `shardwise run` under every launcher, from both sides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise import LLM, SamplingParams

BIN = Path(sys.executable).parent
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
PROMPTS = (
    "Name three primary colors.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Why is the sky blue?",
)
TOKENS = 32
WITHIN = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m", "shardwise"],
    "mpirun": [str(BIN / "mpirun"), "-n", "2", "--bind-to", "none", str(BIN / "shardwise")],
}


def environment(**more: str) -> dict[str, str]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("SHARDWISE_", "TRITON_"))}
    return {**clean, **ROOT, "OMP_NUM_THREADS": "1", **more}


def shell(*command: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=280)


def cli(*words: str, **more: str) -> subprocess.CompletedProcess:
    return shell(sys.executable, "-m", "shardwise", *words, **more)


@pytest.fixture(scope="module")
def expected():
    """Completions of one rank alone."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with LLM("smollm2", tp=1) as llm:
            done = llm.generate(conversations, SamplingParams(max_new_tokens=TOKENS))
    assert all(completion.token_ids for completion in done)
    return done


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return str(path)


def check(path: Path, expected, world: int) -> dict:
    result = json.loads(path.read_text())
    assert [each["token_ids"] for each in result["completions"]] == [list(each.token_ids) for each in expected]
    assert [each["text"] for each in result["completions"]] == [each.text for each in expected]
    assert [each["prompt_tokens"] for each in result["completions"]] == [each.prompt_tokens for each in expected]
    assert [rank["rank"] for rank in result["ranks"]] == list(range(world))
    return result


@pytest.mark.parametrize("launcher, tp", [("local", 2), ("local", 3), ("torchrun", 2), ("mpi", 2), ("ray", 2)])
def test_tokens_are_those_of_one_rank_under_every_launcher(tmp_path, expected, prompts, parity, launcher, tp):
    if launcher == "ray":
        pytest.importorskip("ray")
    parity(f"smollm2 by {launcher}", f"tp {tp}", "shm")
    out = tmp_path / "out.json"
    words = ["run", "smollm2", "--tp", str(tp), "--launcher", launcher, "--prompts", prompts]
    done = cli(*words, "--max-new-tokens", str(TOKENS), "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = check(out, expected, tp)
    assert result["launcher"] == launcher and result["transport"] == "shm"
    assert f"{tp} ranks" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("launcher", WITHIN)
def test_tokens_are_those_of_one_rank_inside_a_launcher_of_the_user(tmp_path, expected, prompts, parity, launcher):
    parity(f"smollm2 inside {launcher}", "tp 2", "shm")
    out = tmp_path / "out.json"
    words = ["run", "smollm2", "--prompts", prompts, "--max-new-tokens", str(TOKENS), "--json", str(out)]
    done = shell(*WITHIN[launcher], *words)
    assert done.returncode == 0, done.stderr
    result = check(out, expected, 2)
    assert result["layout"]["tp"] == 2
    assert done.stdout.count(PROMPTS[0]) == 1, "only rank 0 speaks"


def test_a_world_that_contradicts_tp_names_both_sides():
    done = shell(*WITHIN["mpirun"], "run", "smollm2", "--tp", "3")
    assert done.returncode == 2
    assert "tp 3 x attn_dp 1 needs 3 ranks, but Open MPI started 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_launcher_inside_a_launcher_is_refused():
    done = shell(*WITHIN["mpirun"], "run", "smollm2", "--launcher", "local")
    assert done.returncode == 2 and "already rank" in done.stderr and "Open MPI" in done.stderr
