"""Plan documents: what they hold, two of them compared, one made again; a damaged file is one sentence."""

import json
from pathlib import Path

import pytest
from published_models import CONFIGS, model

from shardwise.launch.cli import main
from shardwise.sharding.config import ConfigError
from shardwise.sharding.document import document, document_lines, plan_hash
from shardwise.sharding.plan import plan
from shardwise.sharding.replay import replay

SMOL, MOE = "HuggingFaceTB/SmolLM-135M", "Qwen/Qwen3-30B-A3B"


@pytest.mark.parametrize("per_tensor", [False, True])
def test_lines_and_document_say_the_same(per_tensor):
    made = plan(model(MOE), tp=2, ep=2)
    text = "\n".join(document_lines(made, per_tensor=per_tensor))
    assert json.loads(text) == json.loads(json.dumps(document(made, per_tensor=per_tensor)))


def test_per_tensor_lists_what_the_rank_holds():
    made = plan(model(MOE), tp=2, ep=2)
    rows = document(made, per_tensor=True)["ranks"][1]["tensors"]
    held = {s.name: s.nbytes for s in made.shards(1)}
    assert {row["pattern"]: row["bytes"] for row in rows} == held


def test_the_hash_follows_what_matters():
    one = plan_hash(plan(CONFIGS[SMOL], tp=2))
    assert one == plan_hash(plan(CONFIGS[SMOL] | {"_name_or_path": "elsewhere"}, tp=2))
    others = [
        plan(CONFIGS[SMOL], tp=3),
        plan(CONFIGS[SMOL] | {"rope_theta": 5.0}, tp=2),
        plan(CONFIGS[SMOL] | {"torch_dtype": "float32"}, tp=2),
        plan(CONFIGS[SMOL], tp=2, pad=["vocab"]),
    ]
    assert len({one, *map(plan_hash, others)}) == 5


def test_diff_says_what_moved(tmp_path, capsys):
    config, *files = (str(tmp_path / f"{name}.json") for name in ("config", 2, 3))
    Path(config).write_text(json.dumps(CONFIGS[SMOL]))
    for tp, file in zip((2, 3), files, strict=True):
        assert main(["plan", config, "--tp", str(tp), "--json", file]) == 0
    capsys.readouterr()
    assert main(["plan", "diff", *files, "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)
    assert ["tp", 2, 3] in changes["layout"] and not changes["same"]
    assert {t["change"] for t in changes["tensors"]} == {"shrank"}
    assert len(changes["ranks"]) == 3
    assert main(["plan", "diff", *files]) == 0
    assert "15360 B -> 7680 B" in capsys.readouterr().out
    assert main(["plan", "diff", files[0], files[0]]) == 0
    assert capsys.readouterr().out.strip() == "the plans are the same"
    assert main(["plan", "diff", files[0]]) == 2
    assert main(["plan", "diff", files[0], config]) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--kv-bytes", "1"], ["options kv_itemsize: 2 -> 1", "24576 B -> 12288 B"]),
        (["--context", "64k"], ["rank  weights    KV cache a token  cache", "768.000 MiB -> 1.500 GiB"]),
        (["--device", "h100"], ["cost device: h200 -> h100", "cost decode.total: 0.00"]),
        (["--redundant-experts", "8"], ["rank 1, experts added: 0; removed: none"]),
    ],
)
def test_diff_sees_what_is_beside_weights_and_layout(changed, words, tmp_path, capsys):
    base = {"--tp": "8", "--ep": "8", "--context": "32k", "--device": "h200"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["Qwen/Qwen3-30B-A3B"]))
    files = []
    for options in (base, base | {changed[0]: changed[1]}):
        files.append(str(tmp_path / f"{len(files)}.json"))
        arguments = [word for option in options.items() for word in option]
        assert main(["plan", str(config), *arguments, "--json", files[-1]]) == 0
    capsys.readouterr()
    assert main(["plan", "diff", *files]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words), text
    assert main(["plan", "diff", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is False


def test_diff_takes_no_layout(capsys):
    assert main(["plan", "diff", "a.json", "b.json", "--tp", "2"]) == 2
    assert "--tp has no effect with diff" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (SMOL, {"tp": 2, "pad": ["vocab"]}),
        (MOE, {"tp": 4, "ep": 4, "redundant_experts": 4, "expert_load": tuple(float(i % 7) for i in range(128))}),
        ("deepseek-ai/DeepSeek-V3", {"tp": 2, "attn_dp": 2, "ep": 4, "extras": ["mtp"]}),
    ],
)
def test_a_plan_file_is_replayed_for_its_model_only(name, options, tmp_path):
    path = tmp_path / "plan.json"
    made = plan(CONFIGS[name], **options)
    path.write_text("\n".join(document_lines(made)))
    again = replay(path, CONFIGS[name])
    assert again == made and again.ranks == made.ranks
    with pytest.raises(ConfigError, match="config, tensors or cuts differ"):
        replay(path, CONFIGS[name] | {"rope_theta": 12345.0})


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    written = "`shardwise plan MODEL --json FILE` writes one"
    for text, words in (("{}", written), ('{"schema_version": 1}', "model is missing")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            replay(path, CONFIGS[SMOL])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["hash"], None, "hash is missing or not a text"),
        (["warnings"], 5, "warnings is missing or not a list"),
        (["ranks"], [], "ranks is empty"),
        (["ranks", 1], 5, r"ranks\[1\] is not an object"),
        (["ranks", 1, "rank"], None, r"ranks\[1\].rank is missing or not an integer"),
        (["ranks", 0, "weight_bytes"], "12", r"ranks\[0\].weight_bytes is missing or not an integer"),
        (["ranks", 0, "experts"], {"0": 1}, r"ranks\[0\].experts is missing or not lists of integers"),
        (["ranks", 0, "experts"], [["0"]], r"ranks\[0\].experts is missing or not lists of integers"),
        (["ranks", 0, "tensors"], None, r"ranks\[0\].tensors is missing or not a list"),
        (["ranks", 0, "tensors", 0, "pattern"], None, r"ranks\[0\].tensors\[0\].pattern is missing or not a text"),
        (["ranks", 0, "tensors", 0, "global_shape"], [[2]], r"global_shape is missing or not a list of integers"),
        (["ranks", 0, "tensors", 0, "bytes"], True, r"ranks\[0\].tensors\[0\].bytes is missing or not an integer"),
        (["collectives", 0, "count"], None, r"collectives\[0\].count is missing or not an integer"),
        (["collectives", 0], [], r"collectives\[0\] is not an object"),
    ],
    ids=str,
)
def test_a_damaged_plan_is_told_by_its_field(tmp_path, capsys, path, value, words):
    file, config = tmp_path / "plan.json", CONFIGS[MOE]
    whole = json.loads(json.dumps(document(plan(config, tp=2, ep=2))))
    *way, last = path
    holder = whole
    for step in way:
        holder = holder[step]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=f"plan.json: .*{words}.*: plan anew"):
        replay(file, config)
    assert main(["plan", "diff", str(file), str(file)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"shardwise: error: {file}: ") and err.count("\n") == 1
