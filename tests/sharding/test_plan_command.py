"""`shardwise plan` from the outside: JSON, text, exit codes, legal sizes; and that it stays light."""

import json
import subprocess
import sys

import pytest
from published_models import CONFIGS, model

from shardwise.launch.cli import main
from shardwise.sharding.layout import MOST_RANKS
from shardwise.sharding.plan import plan
from shardwise.sharding.source import load_model

SMOL, MOE, KIMI = "HuggingFaceTB/SmolLM-135M", "Qwen/Qwen3-30B-A3B", "moonshotai/Kimi-K2-Instruct"


@pytest.fixture
def config(tmp_path):
    def write(name):
        path = tmp_path / f"{name.split('/')[-1]}.json"
        path.write_text(json.dumps(CONFIGS[name]))
        return str(path)

    return write


def test_json_to_standard_output_is_one_document(config, capsys):
    assert main(["plan", config(SMOL), "--tp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1 and found["hash"].startswith("sha256:")
    assert found["model"]["architecture"] == "LlamaForCausalLM" and found["model"]["parameters"] == 134515008
    assert found["layout"] == {"world": 2, "tp": 2, "moe_tp": 2, "moe_ep": 1, "attn_dp": 1}
    assert {"rank", "weight_bytes", "kv_bytes_per_token", "state_bytes_per_sequence", "tensors"} <= set(
        found["ranks"][0]
    )
    assert {"where", "op", "axis", "bytes_per_token", "count"} == set(found["collectives"][0])
    row = next(t for t in found["ranks"][1]["tensors"] if "q_proj" in t["pattern"])
    assert row == {
        "pattern": "model.layers.{layer}.self_attn.q_proj.weight",
        "count": 30,
        "global_shape": [576, 576],
        "local_shape": [192, 576],
        "ranges": [[[384, 576]], [[0, 576]]],
        "dtype": "BF16",
        "bytes": 30 * 192 * 576 * 2,
    }
    assert [sum(t["bytes"] for t in r["tensors"]) for r in found["ranks"]] == [
        r["weight_bytes"] for r in found["ranks"]
    ]


def test_text_names_tensors_ranks_collectives_and_warnings(config, capsys):
    assert main(["plan", config(SMOL), "--tp", "2"]) == 0
    text = capsys.readouterr().out
    for words in ("q_heads (uneven)", "all_reduce", "warning: 9 q_heads on 2 ranks", "134.515 M parameters"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "11"], "9 q_heads in 3 groups on 11 ranks"),
        (["--tp", "2", "--ep", "8"], "--attn-dp 4"),
        (["surplus"], "unexpected 'surplus'"),
        (["--device", "toaster"], "neither a file nor one of"),
        (["--device", "h200", "--tp", "9", "--nodes", "2"], "--nodes 2: 9 ranks"),
        (["--redundant-experts", "-1", "--tp", "2"], None),
    ],
)
def test_impossible_requests_exit_2_with_one_sentence(config, capsys, arguments, words):
    name = MOE if words is None else SMOL
    assert main(["plan", config(name), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("shardwise: error: ") and err.count("\n") == 1
    assert (words or "-1 redundant experts") in err


def test_a_bad_config_exits_1(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert main(["plan", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_model_that_does_not_fit_exits_3(config, capsys):
    assert main(["plan", config(KIMI), "--tp", "8", "--ep", "8", "--device", "h100"]) == 3
    assert "does not fit" in capsys.readouterr().err
    assert main(["plan", config(SMOL), "--device", "h100", "--context", "32k", "--batch", "4"]) == 0
    assert "predicted ms" in capsys.readouterr().out


def test_what_does_not_fit_names_what_would(config, capsys):
    assert main(["plan", config(KIMI), "--tp", "8", "--ep", "8", "--device", "h100"]) == 3
    assert "; what fits: tp 16 (--search --gpus 16" in capsys.readouterr().err
    workload = ["--device", "h100", "--tp", "2", "--context", "32k"]
    assert main(["plan", config(MOE), *workload, "--batch", "500"]) == 3
    batch = capsys.readouterr().err.split("--batch ")[1].split(";")[0]
    assert main(["plan", config(MOE), *workload, "--batch", batch]) == 0
    assert f"  {batch} sequences of 32768 tokens" in capsys.readouterr().out


def test_each_predicted_step_names_its_tokens(config, capsys):
    assert main(["plan", config(SMOL), "--device", "h200", "--batch", "3", "--context", "1k", "--prompt", "512"]) == 0
    text = capsys.readouterr().out
    assert "decode, 3 x 1024 tokens cached" in text and "prefill, 3 x 512 tokens" in text


def test_nodes_decide_which_links_are_crossed(config, capsys):
    seconds = []
    for nodes in ("1", "2"):
        assert main(["plan", config(SMOL), "--tp", "8", "--device", "h200", "--nodes", nodes, "--json"]) == 0
        cost = json.loads(capsys.readouterr().out)["cost"]
        seconds.append(cost["decode"]["communication"])
        assert cost["nodes"] == int(nodes) and cost["most_sequences"] > 1000
    assert seconds[1] > 4 * seconds[0]


def test_a_context_beyond_the_models_positions_is_warned_of(config, capsys):
    assert main(["plan", config(SMOL), "--device", "h200", "--context", "8k"]) == 0
    assert "warning: 8192 tokens a sequence are more than the model's 2048 positions" in capsys.readouterr().out


def test_legal_sizes(config, capsys):
    assert main(["plan", config(SMOL), "--legal"]) == 0
    text = capsys.readouterr().out
    assert "tp: 1 to 9; even: 1, 3" in text and "stopped at 9 by" in text
    assert main(["plan", config("openai/gpt-oss-120b"), "--legal", "--json"]) == 0
    rows = {r["mesh"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["moe_tp"]["most"] == 90 and 4 not in rows["moe_tp"]["even"]
    assert rows["moe_ep"]["most"] == 128


def test_legal_sizes_end_at_the_most_ranks_of_a_plan():
    from shardwise.sharding.legal import legal_sizes

    wide = CONFIGS[MOE] | {"moe_intermediate_size": 1 << 30}
    _, moe_tp, _ = legal_sizes(load_model(wide))
    assert moe_tp.most == MOST_RANKS and moe_tp.even == tuple(1 << i for i in range(18))
    assert moe_tp.stopped_by == "the most ranks of a plan"


@pytest.mark.parametrize("name", [SMOL, MOE, "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V4-Flash"])
def test_legal_sizes_are_exactly_those_that_plan(name):
    from shardwise.sharding.cutting import IllegalLayout
    from shardwise.sharding.legal import legal_sizes

    most = {row.mesh: row.most for row in legal_sizes(model(name))}
    for tp in {1, 2, most["tp"]}:
        plan(model(name), tp=tp, ep=1 if "moe_tp" not in most or tp <= most["moe_tp"] else tp)
    with pytest.raises(IllegalLayout, match=f"{most['tp'] + 1} ranks"):
        plan(model(name), tp=most["tp"] + 1)


def test_search_ranks_layouts(config, capsys):
    assert main(["plan", config(MOE), "--search", "--gpus", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranked"] and all(row["world"] <= 4 for row in found["ranked"])
    assert (found["device"], found["devices"], found["workload"]["context"]) == ("h200", 4, 4096)
    assert main(["plan", config(MOE), "--search", "--gpus", "4", "--batch", "3", "--device", "h100"]) == 0
    out, err = capsys.readouterr()
    assert "on 4 x h100 (79.600 GiB), by latency: each replica serves 3 x 4096 tokens" in out and err == ""


def test_a_search_without_a_layout_that_fits_says_how_much_is_missing(config, capsys):
    assert main(["plan", config(KIMI), "--search", "--gpus", "4", "--json", "/dev/null"]) == 3
    assert "shardwise: no layout fits: " in (err := capsys.readouterr().err) and "GiB too much a rank" in err


def test_search_and_what_would_fit_take_the_type_of_weights_and_cache_into_account(config, capsys):
    workload = ["--device", "h200", "--batch", "256", "--context", "32k"]

    def left(*more):
        main(["plan", config(MOE), "--search", "--gpus", "1", *workload, *more, "--json"])
        return json.loads(capsys.readouterr().out)["ranked"][0]["bytes_left"]

    cache = 256 * 32768 * 48 * 4 * 2 * 128  # sequences, tokens, layers, KV heads, keys and values, head size
    assert left("--kv-bytes", "1") - left() == cache
    assert left() - left("--dtype", "float32") > 2 * 30e9
    assert main(["plan", config(MOE), *workload, "--kv-bytes", "1"]) == 3
    fits = capsys.readouterr().err.split("; or tp ")[1]
    gpus = fits.split("--gpus ")[1].split()[0]
    assert main(["plan", config(MOE), "--search", "--gpus", gpus, *workload, "--kv-bytes", "1"]) == 0
    assert main(["plan", config(MOE), "--search", "--gpus", str(int(gpus) // 2), *workload, "--kv-bytes", "1"]) == 3


def test_one_rank_an_expert_is_no_contradiction_where_there_are_none(config, capsys):
    assert main(["plan", config(SMOL), "--tp", "3", "--ep", "1", "--moe-tp", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["world"] == 3
    assert main(["plan", config(MOE), "--tp", "4", "--ep", "1", "--moe-tp", "1"]) == 2
    assert "tp * attn_dp = world = moe_tp * ep does not hold" in capsys.readouterr().err


def test_the_cache_of_a_context_needs_no_machine(config, capsys):
    asked = ["plan", config(MOE), "--tp", "8", "--ep", "8", "--context", "32k", "--batch", "16"]
    a_rank = 16 * 32768 * 48 * 1 * 2 * 128 * 2  # sequences, tokens, layers, KV heads, keys and values, head size, bytes
    assert main([*asked, "--json"]) == 0
    assert {rank["cache_bytes"] for rank in json.loads(capsys.readouterr().out)["ranks"]} == {a_rank}
    assert main(asked) == 0
    table = capsys.readouterr().out
    assert "cache, 16 x 32768 tokens" in table and f"{a_rank / 2**30:.3f} GiB" in table
    assert main(["plan", config(MOE), "--attn-dp", "8", "--ep", "8", "--context", "1m", "--batch", "9", "--json"]) == 0
    two_sequences = 2 * 2**20 * 48 * 4 * 2 * 128 * 2
    assert json.loads(capsys.readouterr().out)["ranks"][0]["cache_bytes"] == two_sequences
    assert main(["plan", config(MOE), "--context", "1m"]) == 0
    assert "1048576 tokens a sequence are more than the model's" in capsys.readouterr().out
    assert main(["plan", config(MOE), "--json"]) == 0
    assert "cache_bytes" not in json.loads(capsys.readouterr().out)["ranks"][0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--tp 2 --nodes 2", "--nodes is for the cost on a machine: add --device NAME"),
        ("--context 32k --nodes 2", "--nodes is for the cost on a machine"),
        ("--prompt 1k", "--prompt is for the cost on a machine"),
        ("--per-tensor", "--per-tensor is for --json: add that"),
        ("--gpus 4", "--gpus is for --search: add that"),
        ("--objective memory", "--objective is for --search"),
        ("--html -", "--html -: does not go to standard output, name a file"),
        ("--search --gpus 4097", "4097 devices are more than a search tries (4096): search a part"),
        ("--search --tp 2", "--tp has no effect with --search: drop one of them"),
        ("--search --attn-dp 1", "--attn-dp has no effect with --search"),
        ("--legal --html page.html", "--html has no effect with --legal"),
        ("--legal --ep 2", "--ep has no effect with --legal"),
        ("--legal --search", "--search has no effect with --legal"),
        ("--export-tp-plan --json", "--json has no effect with --export-tp-plan"),
    ],
)
def test_options_without_an_effect_are_refused(config, capsys, arguments, words):
    assert main(["plan", config(SMOL), *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"shardwise: error: {words}") and err.count("\n") == 1


def test_the_cost_of_a_page_may_be_shaped_without_naming_its_device(config, tmp_path):
    page = tmp_path / "page.html"
    assert main(["plan", config(SMOL), "--html", str(page), "--batch", "4"]) == 0
    assert page.exists()


def test_planning_imports_neither_torch_nor_numpy(config):
    code = (
        "import sys; from shardwise.launch.cli import main; "
        f"main(['plan', {config(KIMI)!r}, '--tp', '8', '--ep', '8', '--json', '/dev/null']); "
        "heavy = {'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
