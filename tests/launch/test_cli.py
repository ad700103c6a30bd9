"""The command line: verbs, exit codes, errors in one sentence, nothing heavy imported, no process left behind."""

import argparse
import contextlib
import gzip
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shardwise.comm.watch import LOG_FOLDER_ENV
from shardwise.launch.cli import BENCHES, VERBS, main
from shardwise.launch.cli.run import _prompts, _Screen
from shardwise.launch.failure import Failure, write
from shardwise.parallel.results import TokenEvent


def cli(*words: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "shardwise", *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **more},
    )


def without_torch(*words: str) -> subprocess.CompletedProcess:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers', 'ray', 'rich'): raise AssertionError(name + ' was imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from shardwise.launch.cli import main\n"
        f"sys.exit(main({list(words)!r}))\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["plan", "smollm2", "--tp", "2"], ["explain", "--help"]]
)
def test_help_and_plan_import_nothing_heavy(words):
    done = without_torch(*words)
    assert done.returncode == 0, done.stderr


def test_standard_output_on_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shardwise", "ops"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=280
        )
    assert (done.returncode, done.stderr) == (1, "shardwise: error: No space left on device\n")


@pytest.mark.parametrize("option", ["--json", "--html", "--export-tp-plan"])
def test_a_full_disk_is_one_sentence_that_names_the_file(capfd, option):
    assert main(["plan", "smollm2", "--tp", "3", option, "/dev/full"]) == 1
    assert capfd.readouterr() == ("", "shardwise: error: /dev/full: No space left on device\n")


def test_every_verb_stands_in_the_help():
    text = cli("--help").stdout
    assert all(verb in text for verb in VERBS)
    text = cli("bench", "--help").stdout
    assert all(what in text for what in BENCHES)


@pytest.mark.parametrize("module", [*sorted(VERBS.keys() - {"bench"}), *(f"bench_{what}" for what in BENCHES)])
def test_every_option_has_a_word_in_the_help(module):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"shardwise.launch.cli.{module}").add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such-verb"],
        ["bench"],
        ["run"],
        ["run", "smollm2", "--dtype", "int3"],
        ["run", "smollm2", "--decode", "nope"],
    ],
)
def test_unusable_command_lines_are_one_sentence_and_exit_with_2(words):
    done = cli(*words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "error: " in done.stderr and "--help lists what is legal" in done.stderr


@pytest.mark.parametrize(
    "words, code, text",
    [
        (["run", "smollm2", "--launcher", "warp"], 2, "unknown launcher 'warp'; legal: local, torchrun, mpi, ray"),
        (["run", "smollm2", "--tp", "0"], 2, "argument --tp: '0' is not a number of at least 1"),
        (["plan", "smollm2", "--moe-tp", "0"], 2, "argument --moe-tp: '0' is not a number of at least 1"),
        (["bench", "generate", "smollm2", "--batch", "0"], 2, "--batch: '0' is not a number of at least 1"),
        (["run", "smollm2", "--tp", "²"], 2, "argument --tp: '²' is not a number of at least 1"),
        (["run", "smollm2", "--cache-tokens", "9" * 30], 2, f"--cache-tokens: {'9' * 18}... has more than 18 digits"),
        (["plan", "smollm2", "--device", "h200", "--context", "²k"], 2, "'²k' is not a token count; examples: 4096"),
        (["plan", "smollm2", "--dtype", ""], 2, "--dtype is empty: name something, or leave it out"),
        (["plan", "smollm2", "--html", ""], 2, "--html is empty: name a file"),
        (["run", "smollm2", "--prompts", ""], 2, "--prompts is empty: name a file, or - for standard input"),
        (["run", "smollm2", "--launcher", "ray", "--ray-address", ""], 2, "the Ray address is empty: leave it out"),
        (["bench", "comm", "--sizes", "99999GiB"], 3, "--sizes: 2 ranks with an input and an output of 107373108658"),
        (["bench", "comm", "--peers", "none,gloo"], 2, "unknown peer on cpu 'none'; legal: gloo, mpi"),
        (["bench", "generate", "smollm2", "--batch", "9" * 12], 3, "--batch 999999999999: prompts and answers of 384"),
        (["run", "smollm2", "-n", "4", "--tp", "3"], 2, "-n 4 contradicts --tp 3"),
        (["run", "smollm2", "--transport", "pigeon"], 2, "transport 'pigeon' is unknown, legal: auto, gloo, nccl"),
        (["run", "smollm2", "--json", "/no/such/file"], 2, "--json /no/such/file: there is no folder /no/such"),
        (["run", "smollm2", "--top-p", "2"], 2, "--top-p is 2.0, legal: a number above 0 and at most 1"),
        (["run", "smollm2", "--seed", "9" * 23], 2, "legal: from -2**63 to 2**64 - 1"),
        (["run", "smollm2", "--tp", "2", "--transport", "fake"], 2, "transport fake has no peers in other processes"),
        (["run", "smollm2", "--decode", "graphs", "--device", "cpu"], 2, "decode graphs needs a CUDA device"),
        (["run", "smollm2", "--cache-tokens", "3"], 2, "of 16 tokens on the CPU and 64 for the kernels of GPUs"),
        (["run", "smollm2", "--trace", "/proc/x"], 2, "trace /proc/x: no folder can be made there"),
        (["run", "smollm2", "--tp", "2", "--ep", "3"], 2, "world % ep = 2 % 3 = 2"),
        (["run", "smollm2", "--tp", "2", "--ep", "2"], 2, "ep 2: smollm2 has no experts that ranks could share"),
        (["run", "smollm2", "--attention", "flashinfer", "--device", "cpu"], 2, "attention flashinfer needs a CUDA"),
        (["run", "smollm2", "--transport", "nccl", "--device", "cpu"], 2, "transport nccl needs CUDA devices; legal"),
        (["run", "smollm2", "--transport", "mpi"], 2, "transport mpi needs ranks that mpirun started: name launcher"),
        (["run", "smollm2", "--log-dir", __file__], 2, "test_cli.py: no folder can be made there: File exists"),
        (["run", "smollm2", "--json", "/tmp"], 2, "--json /tmp: is a folder, name a file in it"),
        (["plan"], 2, "the following arguments are required: MODEL (shardwise plan --help"),
        (["plan", "smollm2", "--json", "/no/such/file"], 2, "--json /no/such/file: there is no folder /no/such"),
        (["plan", "smollm2", "--html", "/tmp"], 2, "--html /tmp: is a folder"),
        (["plan", "smollm2", "--export-tp-plan"], 2, "tp 1 cuts nothing, so there is no tp_plan: give --tp"),
        (["doctor", "--json", "/no/such/file"], 2, "--json /no/such/file: there is no folder /no/such"),
        (["bench", "comm", "-n", "9999999"], 3, "9999999 ranks do not fit on this host: each takes 128 MiB of its own"),
        (["shard", "/no/such", "--out", "y", "--merge"], 1, "/no/such: there is no such folder"),
        (["run", "smollm2", "--tp", "99"], 2, "tp 99 does not fit"),
        (["bench", "generate", "smollm2", "--tp", "99"], 2, "tp 99 does not fit"),
        (["run", "smollm2", "--ray-address", "auto"], 2, "'auto' has no effect with launcher local: name launcher ray"),
        (["run", "no-such-model"], 1, "is neither a file nor a folder"),
        (["run", ""], 1, "the model's name is empty"),
        (["run", "smollm2", "--prompt", "a\udcff"], 1, "prompt 0 is no Unicode text: surrogates not allowed at char"),
        (["run", "smollm2", "--prompts", "/no/such/file"], 2, "--prompts /no/such/file: No such file or directory"),
        (["run", "smollm2", "--prompts", sys.executable], 2, "python: is not UTF-8 text: invalid "),
        (["run", "smollm2", "--plan", "/no/such/file"], 2, "--plan /no/such/file: no such file"),
        (["plan", "smollm2", "--device", __file__], 2, f"--device {__file__}: not valid JSON"),
        (["plan", "smollm2", "--expert-load", "/no/such/file"], 2, "--expert-load /no/such/file: no such file"),
        (["plan", "smollm2", "--tp-plan", "/no/such/file"], 2, "--tp-plan /no/such/file: no such file"),
        (["bench", "comm", "-n", "0"], 2, "argument -n/--world: '0' is not a number of at least 1"),
        (["bench", "moe", "--tokens", "0"], 2, "argument --tokens: '0' is not a number of at least 1"),
        (["--frob"], 2, "shardwise: error: unrecognized arguments: --frob"),
        (
            ["bench", "comm", "--op", "broadcast", "--strategy", "ONESHOT"],
            2,
            "--strategy ONESHOT is of all-reduce: add",
        ),
        (["bench", "comm", "--calibrate", "here.json", "-n", "1"], 2, "--calibrate needs all_reduce of two ranks"),
        (["bench", "comm", "--transport", "nope"], 2, "unknown transport 'nope'; legal: auto, gloo, nccl, mpi, shm"),
        (["bench", "comm", "--transport", "fake"], 2, "unknown transport 'fake'; legal: auto, gloo, nccl, mpi, shm"),
        (["bench", "comm", "--json", "/no/such/file"], 2, "--json /no/such/file: there is no folder /no/such"),
        (["bench", "comm", "--calibrate", "-"], 2, "--calibrate -: does not go to standard output, name a file"),
        (["bench", "comm", "--calibrate", "/no/such/file"], 2, "--calibrate /no/such/file: there is no folder"),
        (
            ["bench", "comm", "--calibrate", "here.json", "--sizes", "4KiB"],
            2,
            "--calibrate needs all_reduce of two ranks at two sizes",
        ),
        (["shard", "smollm2", "--out", "x", "--tp", "99"], 2, "tp 99 does not fit"),
        (["shard", "smollm2", "--out", ""], 2, "--out is empty: name a folder"),
        (["run", "smollm2", "--trace", ""], 2, "trace is empty: name a folder"),
        (["run", "smollm2", "--log-dir", ""], 2, "--log-dir is empty: name a folder"),
        (["shard", "smollm2", "--out", "x", "--tp", "2", "--ep", "3"], 2, "world % ep = 2 % 3 = 2"),
        (["shard", "x", "--out", "y", "--merge", "--tp", "2"], 2, "--tp has no effect with --merge"),
        (["explain", "/no/such/file"], 1, "/no/such/file: No such file or directory"),
        (["explain", __file__], 1, "not a failure report of Shardwise: name a failure.json"),
    ],
)
def test_errors_are_one_sentence(monkeypatch, capfd, words, code, text):
    monkeypatch.delenv(LOG_FOLDER_ENV, raising=False)
    try:
        assert main(words) == code
    except SystemExit as end:  # the parser's
        assert end.code == code
    out, err = capfd.readouterr()
    assert out == "" and ": error: " in err and err.startswith("shardwise") and err.count("\n") == 1
    assert text in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "smollm2", "--decode", "graphs"], "decode graphs needs a CUDA device; legal here: auto, layers"),
        (["run", "smollm2", "--transport", "nccl"], "transport nccl needs CUDA devices; legal here: auto, gloo, "),
        (["bench", "comm", "--transport", "p2p", "-n", "1"], "device cuda, rank 0: no CUDA device"),
    ],
)
def test_a_device_that_only_ranks_find_missing_is_the_command_lines_mistake_too(capfd, words, said):
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"shardwise: error: {said}") and err.count("\n") == 1


def test_what_is_no_address_of_a_ray_cluster_says_what_to_do(capfd):
    pytest.importorskip("ray")
    assert main(["run", "smollm2", "--tp", "2", "--launcher", "ray", "--ray-address", "nope"]) == 1
    err = capfd.readouterr().err
    assert "at the address 'nope' (" in err and "or leave the address out" in err and err.count("\n") == 1


def test_an_address_without_a_ray_cluster_is_one_sentence_within_seconds(capfd):
    pytest.importorskip("ray")
    with socket.socket() as deaf:  # bound, but nobody listens
        deaf.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        assert main(["run", "smollm2", "--tp", "2", "--launcher", "ray", "--ray-address", address]) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"shardwise: error: no Ray cluster lets us in at the address '{address}'")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["run", "smollm2", "--prompts", "-"], ["plan", "-"]])
def test_standard_input_that_is_closed_is_the_users_to_open(monkeypatch, capfd, words):
    monkeypatch.setattr("sys.stdin", None)
    assert main(words) == 1
    err = capfd.readouterr().err
    assert "- is standard input, which is closed: pipe " in err and err.count("\n") == 1


def test_a_standard_error_that_is_closed_is_no_reason_to_fail():
    words = [sys.executable, "-m", "shardwise", "run", "smollm2", "--max-new-tokens", "1", "--weights", "native"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *words], capture_output=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout


def test_a_current_folder_that_was_removed_is_one_sentence(tmp_path):
    script = 'cd "$1" && rmdir "$1" && exec "$2" -m shardwise plan smollm2'
    words = ["sh", "-c", script, "sh", str(tmp_path / "gone"), sys.executable]
    (tmp_path / "gone").mkdir()
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "shardwise: error: the current folder is gone: change into one that is there\n"


def test_debug_shows_the_traceback(capfd):
    assert main(["run", "no-such-model", "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    "content, text",
    [(b"GGUF" + bytes(3), "broken.gguf"), (b"not a model at all, whatever the name says", "broken.gguf")],
    ids=["truncated", "wrong magic"],
)
def test_a_file_that_is_no_model_is_refused_before_ranks_start(tmp_path, capfd, content, text):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert main(["run", str(path), "--tp", "2"]) == 1
    err = capfd.readouterr().err
    assert text in err and "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--raw"]], ids=["chat", "raw"])
def test_a_prompt_longer_than_the_context_is_one_sentence_before_ranks_start(monkeypatch, capfd, words):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    assert main(["run", "smollm2", "--tp", "2", "--prompt", "word " * 9000, *words]) == 1
    err = capfd.readouterr().err
    assert err.startswith("shardwise: error: prompt 0 has 90") and "context holds 8192" in err and err.count("\n") == 1


@pytest.mark.parametrize("template", [None, "{% for %}", "{{ raise_exception('not today') }}", "{{ messages.x.y }}"])
def test_a_template_that_makes_no_prompt_is_one_sentence_before_ranks_start(monkeypatch, capfd, template):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    monkeypatch.setattr("shardwise.parallel.tokenizer.chat_template", lambda checkpoint: template)
    assert main(["run", "smollm2", "--tp", "2"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("shardwise: error: ") and "chat template" in err and err.count("\n") == 1


def test_a_cache_too_small_for_the_prompt_is_one_sentence_before_ranks_start(monkeypatch, capfd):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    assert main(["run", "smollm2", "--cache-tokens", "32", "--max-new-tokens", "100"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("shardwise: error: prompt 0 may become 1") and err.count("\n") == 1
    assert "the cache holds 32" in err


@pytest.mark.parametrize("launcher", ["local", "mpirun"])
def test_a_host_without_room_is_one_sentence_and_exits_with_3_before_a_weight_is_read(launcher):
    words = ["-m", "shardwise", "run", "smollm2", "--cache-tokens", "1000000000"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    start = [str(Path(sys.executable).parent / "mpirun"), "-n", "2"] if launcher == "mpirun" else []
    done = subprocess.run(
        [*start, sys.executable, *words], capture_output=True, text=True, timeout=280, env={**os.environ, **root}
    )
    assert done.returncode == 3 and done.stdout == "" and "loading" not in done.stderr
    assert done.stderr.count("shardwise: error: no memory for the model on 1 of 1 hosts: 0.5 GiB of weights") == 1
    assert "; what fits: cache_tokens " in done.stderr and "Traceback" not in done.stderr


def test_json_on_standard_output_is_all_there_is(tmp_path):
    words = ["--max-new-tokens", "4", "--raw", "--json", "--trace", str(tmp_path / "traces")]
    done = cli("run", "smollm2", "--tp", "2", *words, OMP_NUM_THREADS="1")
    result = json.loads(done.stdout)
    expected = {
        "text", "token_ids", "prompt_tokens", "new_tokens", "tokens_per_second", "time_to_first_token_seconds",
        "ranks", "launcher", "transport",
    }  # fmt: skip
    assert expected <= result.keys()
    assert result["new_tokens"] == len(result["token_ids"]) == 4
    assert result["launcher"] == "local" and result["transport"] == "shm"
    assert sum(rank["weight_bytes"] for rank in result["ranks"]) < 1.02 * 4 * 134_515_008
    assert "loading 100 %" in done.stderr
    for rank in range(2):
        events = json.loads(gzip.decompress((tmp_path / "traces" / f"rank-{rank}.json.gz").read_bytes()))["traceEvents"]
        assert {event["pid"] for event in events} == {rank}
        assert {"prefill", "decode", "sample"} <= {event["name"] for event in events}


def test_every_verb_writes_json_to_a_file_and_shows_its_table_all_the_same(tmp_path, capfd):
    file = tmp_path / "out.json"
    for words in (["plan", "smollm2"], ["ops", "--category", "rope"]):
        assert main([*words, "--json", str(file)]) == 0
        assert json.loads(file.read_text()) and capfd.readouterr().out.count("\n") > 3


def test_a_prompt_a_line_may_hold_what_else_ends_lines_of_a_text(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffone\u2028of two\x0cparts\r\n\n  \ntwo\n", encoding="utf-8")
    assert _prompts(argparse.Namespace(prompts=str(file))) == ["one\u2028of two\x0cparts", "two"]


@pytest.mark.parametrize("text", ['["a"', "[" * 100_000])
def test_what_only_begins_like_a_list_of_prompts_is_told_as_that(tmp_path, text):
    file = tmp_path / "prompts.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="prompts.json: begins like a JSON list but is not one: "):
        _prompts(argparse.Namespace(prompts=str(file)))


def test_answers_stream_in_the_order_of_the_prompts(capsys):
    screen = _Screen(["one", "two"])
    seen = []
    for event in (
        TokenEvent(1, 5, "later"),
        TokenEvent(0, 6, "fir"),
        TokenEvent(1, 7, ".", finish_reason="stop"),
        TokenEvent(0, 8, "st", finish_reason="length"),
    ):
        screen.add(event)
        seen.append(capsys.readouterr().out)
    assert seen == ["> one\n", "fir", "", "st\n\n> two\nlater.\n\n"]


def test_the_answer_to_one_prompt_stands_alone(capsys):
    screen = _Screen(["one"])
    screen.add(TokenEvent(0, 6, "text", finish_reason="stop"))
    assert capsys.readouterr().out == "text\n"


@pytest.mark.parametrize("texts, shown", [([], ""), (["cut o", ""], "cut o\n"), (["all\n"], "all\n")])
def test_what_is_said_of_an_answer_that_broke_off_begins_a_line(capsys, texts, shown):
    with contextlib.suppress(ZeroDivisionError), _Screen(["one"]) as screen:
        for text in texts:
            screen.add(TokenEvent(0, 6, text))
        raise ZeroDivisionError
    assert capsys.readouterr().out == shown


@pytest.mark.alone
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_within_a_moment(signum):
    command = [
        sys.executable,
        "-m",
        "shardwise",
        "run",
        "smollm2",
        "--tp",
        "2",
        "--max-new-tokens",
        "4000",
        "--ignore-eos",
        "--weights",
        "native",
    ]
    mark = f"{os.getpid()}-{signum}"
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "MARK": mark})
    assert run.stdout is not None and run.stdout.read(1)
    run.send_signal(signum)
    started = time.monotonic()
    assert run.wait(200) == 128 + signum
    assert time.monotonic() - started < 5
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and f"MARK={mark}".encode() in environ(pid)]
    run.stdout.close()
    assert run.stderr is not None and b"Traceback" not in run.stderr.read()
    run.stderr.close()


def environ(pid: str) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:
        return b""


def test_explain_reads_a_report_and_a_folder_of_them(tmp_path, capsys):
    common = {"world": 2, "host": "node", "pid": 7, "phase": "load", "exit_code": 1}
    write(tmp_path, Failure(rank=0, what="PeerLost: gone", time_ns=1, victim=True, trace="Traceback of 0", **common))
    path = write(tmp_path, Failure(rank=1, what="ValueError: x", time_ns=2, trace="Traceback of 1", **common))
    for source in (path, tmp_path):
        assert main(["explain", str(source)]) == 0
        assert "rank 1 of 2 failed (host node, pid 7) while load: ValueError: x" in capsys.readouterr().out
    assert main(["explain", str(path), "--trace"]) == 0
    text = capsys.readouterr().out
    assert text.index("Traceback of 1") < text.index("Traceback of 0")
    assert main(["explain", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["victims"][0]["rank"] == 0


def test_a_terminal_without_a_character_shows_its_number_and_json_stays_whole(tmp_path):
    failed = Failure(rank=0, world=1, host="h", pid=7, phase="run", what="größer 🦄", exit_code=1, time_ns=1)
    path = str(write(tmp_path, failed))
    shown = cli("explain", path, PYTHONIOENCODING="ascii")
    assert shown.returncode == 0 and r"while run: gr\xf6\xdfer \U0001f984" in shown.stdout
    assert json.loads(cli("explain", path, "--json", PYTHONIOENCODING="ascii").stdout)["what"] == failed.what


def test_explain_refuses_what_is_no_report(tmp_path, capsys):
    failed = Failure(rank=0, world=1, host="h", pid=7, phase="run", what=5, trace=5, exit_code=1, time_ns=1)
    for text in ("[1, 2]", "[" * 100_000, json.dumps(failed.to_json())):
        (tmp_path / "x.json").write_text(text)
        assert main(["explain", str(tmp_path / "x.json")]) == 1
        assert "not a failure report" in capsys.readouterr().err
    assert main(["explain", str(tmp_path)]) == 1
    assert "no rank of that job reported a failure" in capsys.readouterr().err
