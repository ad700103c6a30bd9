"""`shardwise bench generate`: from a config alone, by any launcher, as a table and as JSON."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.launch.cli import main
from shardwise.launch.generation import Load, Run

SHAPE = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}
SIZES = ["--batch", "2", "--input", "8", "--output", "6", "--runs", "2"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("shape") / "gpt-oss-tiny.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


def test_a_shape_is_measured_on_two_ranks_and_every_rank_writes_a_trace(shape, tmp_path, capsys):
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    words = ["--shape", shape, "--dummy-weights", "--tp", "2", "--ep", "2", *SIZES]
    assert main(["bench", "generate", *words, "--json", str(out), "--trace", str(traces)]) == 0
    result = json.loads(out.read_text())
    assert result["layout"] == {"tp": 2, "attn_dp": 1, "moe_tp": 0, "ep": 2} and result["dummy_weights"]
    assert result["launcher"] == "local" and result["transport"] == "shm" and result["machine"]["gpu"] is None
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    first = result["ranks"][0]
    assert len(first["runs"]) == 2
    assert result["decode_tokens_per_second"]["median"] in [run["decode_tokens_per_second"] for run in first["runs"]]
    assert 0 < result["share_of_limit"] < 1
    assert first["step_parts"]["decode"]["steps"] == 5 and first["step_parts"]["prefill"]["steps"] == 1
    for parts in first["step_parts"].values():
        assert parts["seconds"]["wall"] <= parts["longest_seconds"]
    assert first["step_bytes"]["experts"] > result["ranks"][1]["step_bytes"]["experts"] > 0
    assert 0.4 <= first["touched_seen"] <= 0.8  # 2 tokens x 2 of 5 experts
    printed = capsys.readouterr().out
    for text in (
        "gpt-oss-tiny.json, random weights, float32; tp 2 ep 2 on 2 ranks (local, shm, cpu)",
        "first token",
        "p50",
        "limit",
    ):
        assert text in printed
    for rank in range(2):
        events = json.loads(gzip.decompress((traces / f"rank-{rank}.json.gz").read_bytes()))["traceEvents"]
        assert {event["pid"] for event in events} == {rank}


def test_inside_torchrun_rank_0_speaks_for_all(shape, tmp_path):
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "-m", "shardwise"]
    words = ["bench", "generate", "--shape", shape, "--dummy-weights", *SIZES, "--json"]
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("SHARDWISE_", "TRITON_"))}
    done = subprocess.run(
        [*command, *words], env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["launcher"] == "torchrun" and result["layout"]["tp"] == 2 and len(result["ranks"]) == 2


@pytest.mark.parametrize(
    "words, code, text",
    [
        ([], 2, "name one MODEL, or a config.json by --shape"),
        (["smollm2", "--shape", "x.json"], 2, "name one MODEL, or a config.json by --shape"),
        (["--shape", "x.json"], 2, "--shape names a model without weights: add --dummy-weights"),
        (["smollm2", "--launcher", "warp"], 2, "unknown launcher 'warp'"),
        (["--shape", "/no/such.json", "--dummy-weights"], 1, "/no/such.json"),
        (["smollm2", "--cache-tokens", "256"], 2, "--output 128 make 384 tokens, the cache holds 256"),
        (["smollm2", "--input", "8000", "--output", "1000"], 2, "make 9000 tokens, the model's context holds 8192"),
    ],
)
def test_contradictions_are_one_sentence_before_any_rank_starts(capfd, words, code, text):
    assert main(["bench", "generate", *words]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("shardwise: error: ") and err.count("\n") == 1 and text in err


def test_rates_and_intervals_follow_from_the_arrivals():
    run = Run(((0.1, 0.2, 0.3), (0.15, 0.25, 0.40)))
    assert run.seconds == 0.40 and run.first_tokens == [0.1, 0.15]
    assert run.tokens_per_second == pytest.approx(6 / 0.40)
    assert run.decode_tokens_per_second == pytest.approx(4 / 0.25)
    assert sorted(run.intervals) == pytest.approx([0.1, 0.1, 0.1, 0.15])
    assert str(Run(((0.1,),)).decode_tokens_per_second) == "nan"


def test_prompts_are_those_of_the_seed():
    load = Load(batch=3, input=5, output=1, seed=7)
    prompts = load.prompts(100)
    assert (
        prompts
        == Load(batch=3, input=5, output=2, seed=7).prompts(100)
        != Load(batch=3, input=5, output=1, seed=8).prompts(100)
    )
    assert [len(prompt) for prompt in prompts] == [5, 5, 5] and all(0 <= token < 100 for p in prompts for token in p)
