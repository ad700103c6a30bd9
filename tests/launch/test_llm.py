"""`LLM` from plain scripts and from scripts that a launcher started."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shardwise import LLM, SamplingParams
from shardwise.launch.job import JobFailed
from shardwise.launch.session import Session
from shardwise.sharding.checkpoint.header import CheckpointError

BIN = Path(sys.executable).parent
GREEDY = SamplingParams(max_new_tokens=8)
QUICK = {"weights": "native"}
"""Loads in a third of the time."""


@pytest.fixture(scope="module")
def llm():
    with LLM("smollm2", tp=2) as model:
        yield model


def test_two_calls_give_the_same_answer_and_one_after_the_other(llm):
    first = llm.generate(["The capital of France is"], GREEDY)
    second = llm.generate(["The capital of France is"], GREEDY)
    assert first == second and "Paris" in first[0].text
    assert len(first[0].token_ids) == 8 and first[0].finish_reason == "length"


def test_streamed_texts_join_to_the_completion(llm):
    events = list(llm.stream(["One, two, three,"], GREEDY))
    assert [event.finished for event in events] == [False] * 7 + [True]
    assert "".join(event.text for event in events) == llm.last_answer.completions[0].text


def test_a_stream_that_is_left_early_leaves_nothing_for_the_next_call(llm):
    for _ in llm.stream(["One, two, three,"], GREEDY):
        break
    assert llm.generate(["The capital of France is"], GREEDY)[0].text.lstrip().startswith("Paris")


def test_a_call_that_is_left_for_good_ends_in_the_ranks_too(llm):
    stream = llm.stream(["One, two, three,"] * 2, SamplingParams(max_new_tokens=4000, ignore_eos=True))
    for _ in stream:
        break
    stream.close()
    left = llm._executor._items
    assert llm.generate(["The capital of France is"], GREEDY)[0].text.lstrip().startswith("Paris")
    assert left.answered and len(left._waiting) < 2000


def test_a_stream_goes_on_after_another_call_and_threads_take_turns(llm):
    whole = [llm.generate([prompt], GREEDY)[0].text for prompt in ("One, two, three,", "The capital of France is")]
    streams = [llm.stream([prompt], GREEDY) for prompt in ("One, two, three,", "The capital of France is")]
    begun = [next(stream).text for stream in streams]
    assert [
        text + "".join(event.text for event in stream) for text, stream in zip(begun, streams, strict=True)
    ] == whole
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: llm.generate(["The capital of France is"], GREEDY)[0].text, range(4)))
    assert found == whole[1:] * 4


def test_parameters_may_come_from_a_generator(llm):
    done = llm.generate(["A", "B"], (SamplingParams(max_new_tokens=n) for n in (1, 2)))
    assert [len(each.token_ids) for each in done] == [1, 2]


def test_what_cannot_be_called_with_progress_is_refused_before_a_rank_starts(monkeypatch):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    with pytest.raises(TypeError, match="on_progress is 5, expected a function of bytes read and bytes to read"):
        LLM("smollm2", on_progress=5)


def test_each_prompt_can_have_its_own_parameters(llm):
    done = llm.generate(["A", [504, 3003]], [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=3)])
    assert [len(each.token_ids) for each in done] == [2, 3]
    with pytest.raises(ValueError, match="2 prompts with 1 sampling parameters"):
        llm.generate(["A", "B"], [GREEDY])


@pytest.mark.parametrize(
    "prompt, text",
    [
        ([1] * 8192, "prompt 1 has 8192 tokens, the model's context holds 8192"),
        ("word " * 9000, "prompt 1 has 9001 tokens, the model's context holds 8192"),
        ([{"role": "user", "content": "word " * 9000}], "prompt 1 has 90.. tokens"),
        ([1, 49152], "prompt 1: token id 49152 is not in the vocabulary of 49152"),
        ("", "prompt 1 has no tokens"),
        ("a\ud800", "prompt 1 is no Unicode text: surrogates not allowed at character 1"),
        ([{"role": "user", "content": "\udcff"}], "prompt 1 is no Unicode text"),
        ([], "prompt 1 has no tokens"),
    ],
    ids=["ids", "text", "chat", "unknown id", "empty text", "half a pair", "bytes in a chat", "no ids"],
)
def test_a_prompt_that_does_not_fit_is_refused_and_the_ranks_stay(llm, prompt, text):
    with pytest.raises(ValueError, match=text):
        llm.generate(["A", prompt], GREEDY)
    assert llm.generate(["The capital of France is"], GREEDY)[0].text.lstrip().startswith("Paris")


@pytest.mark.parametrize(
    "prompts, params, text",
    [
        ([1, 2, 3], None, "prompt 0 is 1: a prompt is a text, a list of token ids, or a conversation"),
        ([{"role": "user", "content": "hi"}], None, "prompt 0 is {'role': 'user', 'content': 'hi'}: a prompt is"),
        ({"role": "user", "content": "hi"}, None, "prompt 0 is {'role'"),
        ([[{"content": "hi"}]], None, "prompt 0 is .*: a prompt is .* which is a list of messages"),
        (["A", ["a", "b"]], None, "prompt 1 is .*: a prompt is"),
        (["A", [0.5]], None, "prompt 1 is .*: a prompt is"),
        ([b"A"], None, "prompt 0 is b'A': a prompt is"),
        (None, None, "prompts is None: give a list of prompts"),
        ("A", {"max_new_tokens": 5}, "params has 'max_new_tokens': give SamplingParams"),
        (["A", "B"], [GREEDY, 5], "params has 5: give SamplingParams"),
        (["A"], 5, "params is 5: give SamplingParams"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_a_type_error_and_the_ranks_stay(llm, prompts, params, text):
    with pytest.raises(TypeError, match=text):
        llm.generate(prompts, params)
    assert llm.generate(["The capital of France is"], GREEDY)[0].text.lstrip().startswith("Paris")


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ raise_exception('users only') }}", "chat template: users only"),
        ("{{ messages + 1 }}", "chat template: TypeError: can only concatenate list"),
        ("{% for %}", "chat template: TemplateSyntaxError: "),
        (None, "this model has no chat template: pass the prompt as raw text"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_a_value_error_and_the_ranks_stay(llm, monkeypatch, template, text):
    monkeypatch.setattr(llm._executor._tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=text):
        llm.generate([[{"role": "user", "content": "Hi"}]], GREEDY)
    assert llm.generate(["The capital of France is"], GREEDY)[0].text.lstrip().startswith("Paris")


def test_a_tokenizer_that_cannot_be_read_is_told_by_the_parent(monkeypatch):
    def unreadable(checkpoint):
        raise CheckpointError("tokenizer.json: no tokenizer")

    monkeypatch.setattr("shardwise.parallel.tokenizer.load_tokenizer", unreadable)
    with pytest.raises(CheckpointError, match="tokenizer.json: no tokenizer"):
        LLM("smollm2", **QUICK)


def test_a_request_larger_than_the_cache_is_refused_and_the_ranks_stay():
    with LLM("smollm2", tp=2, cache_tokens=40, **QUICK) as small:
        with pytest.raises(ValueError, match="prompt 1 may become 10. tokens long .*the cache holds 32;"):
            small.generate(["A", "One, two, three,"], [GREEDY, SamplingParams(max_new_tokens=100)])
        with pytest.raises(ValueError, match="prompt 0 may become 40 tokens long"):
            small.generate([[504] * 32], GREEDY)
        assert len(small.generate([[504] * 24], GREEDY)[0].token_ids) == 8


def test_a_call_that_another_thread_closes_ends_at_once_and_says_so():
    begun, endless = threading.Event(), SamplingParams(max_new_tokens=8000, ignore_eos=True)

    def call(small: LLM) -> None:
        for _ in small.stream(["A"], endless):
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        small = LLM("smollm2", tp=1, **QUICK)
        pid = small._executor._supervisor.hub.hello[0].pid
        running = pool.submit(call, small)
        assert begun.wait(120)
        small.close()
        with pytest.raises(RuntimeError, match="was closed while it generated|have ended, after a failure or a close"):
            running.result(timeout=120)
    assert not Path(f"/proc/{pid}").exists()


def test_a_fork_of_the_process_leaves_its_ranks_alone(llm):
    child = os.fork()
    if child == 0:
        try:
            llm.generate(["x"], GREEDY)
        except RuntimeError as error:
            llm.close()
            os._exit(0 if "another process" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "Paris" in llm.generate(["The capital of France is"], GREEDY)[0].text


def test_after_a_failure_the_next_call_says_that_the_ranks_ended():
    with LLM("smollm2", tp=1, **QUICK) as small:
        os.kill(small._executor._supervisor.hub.hello[0].pid, signal.SIGKILL)
        with pytest.raises(JobFailed, match="rank 0 of 1 failed .* while idle: killed by SIGKILL"):
            small.generate(["A"], GREEDY)
        with pytest.raises(RuntimeError, match="have ended, after a failure or a close: make a new one"):
            small.generate(["A"], GREEDY)


def test_a_seed_makes_sampling_repeatable(llm):
    params = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=7)
    assert llm.generate(["Once upon a time"], params) == llm.generate(["Once upon a time"], params)


def test_stats_tell_every_ranks_share(llm):
    llm.generate(["A"], SamplingParams(max_new_tokens=1))
    ranks = llm.stats()
    assert [rank.rank for rank in ranks] == [0, 1]
    assert ranks[0].weight_bytes > ranks[1].weight_bytes > 0 and all(rank.peak_rss_bytes > 0 for rank in ranks)


def test_stats_are_those_of_the_last_call_that_was_read_to_its_end():
    with LLM("smollm2", tp=1, **QUICK) as fresh:
        (loaded,) = fresh.stats()
        assert loaded.weight_bytes > 0 and loaded.cache == "none yet"
        for _ in fresh.stream(["One, two, three,"], GREEDY):
            break
        assert fresh.stats() == [loaded]
        fresh.generate(["A"], SamplingParams(max_new_tokens=1))
        assert "1 rows of" in fresh.stats()[0].cache


def test_the_parent_of_the_ranks_never_imports_torch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from shardwise import LLM, SamplingParams\n"
        "llm = LLM('smollm2', tp=2, weights='native')\n"
        "print(llm.generate(['The capital of France is'], SamplingParams(max_new_tokens=2))[0].text)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False" and "Paris" in done.stdout


SPMD_SCRIPT = """
import sys
from shardwise import LLM, SamplingParams
llm = LLM('smollm2', weights='native')
if [rank.cache for rank in llm.stats()] != ['none yet'] * 2: sys.exit(9)
text = llm.generate(['The capital of France is'], SamplingParams(max_new_tokens=2))[0].text
print(f'{llm.config.tp} {text!r}\\n', end='', flush=True)
rank = int(__import__('os').environ['OMPI_COMM_WORLD_RANK'])
if rank == 1 and sys.argv[1] == 'raise': raise RuntimeError('on purpose')
if rank == 1 and sys.argv[1] == 'exit': sys.exit(3)
if sys.argv[1] != 'end': llm.generate(['never answered'])
llm.close()
"""


def under_mpirun(folder: Path, program: str, *words: str, **more: str) -> subprocess.CompletedProcess:
    """A script on two ranks."""
    script = folder / "script.py"
    script.write_text(program)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [BIN / "mpirun", "-n", "2", "--bind-to", "none", sys.executable, script, *words]
    return subprocess.run(command, env={**os.environ, **root, **more}, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("end, code", [("end", 0), ("raise", 1), ("exit", 3)])
def test_a_script_under_mpirun_gets_the_same_answer_on_every_rank_and_ends_whole(tmp_path, end, code):
    done = under_mpirun(tmp_path, SPMD_SCRIPT, end, SHARDWISE_DEADLINE_STOP="60")
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines().count("2 ' Paris.'") == 2
    assert ("on purpose" in done.stderr) == (end == "raise")


TWO_MODELS = """
import atexit, gc, weakref
from shardwise import LLM
engines = []
def tell():
    gc.collect()
    print(f'{[engine() for engine in engines]}\\n', end='', flush=True)
atexit.register(tell)
models = [LLM('smollm2', weights='native', transport='mpi') for _ in range(2)]
engines += [weakref.ref(model._executor._session.engine) for model in models]
"""


def test_models_that_a_script_leaves_open_are_closed_before_mpi_and_let_their_weights_go(tmp_path):
    done = under_mpirun(tmp_path, TWO_MODELS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("[None, None]") == 2


def test_a_rank_that_cannot_load_is_reported_and_nothing_stays(tmp_path):
    from shardwise.sharding.checkpoint.resolve import resolve

    whole = resolve("smollm2").read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((JobFailed, ValueError), match="broken.gguf"):
        LLM(str(broken), tp=2)


@pytest.mark.parametrize(
    "option, text",
    [
        ({"dtype": "x"}, "dtype 'x' is unknown, legal: auto, float32, bfloat16, float16"),
        ({"weights": "x"}, "weights 'x' is unknown, legal: auto, native, dequantised"),
        ({"device": "x"}, "device 'x' is unknown, legal: auto, cpu, cuda"),
        ({"decode": "x"}, "decode 'x' is unknown, legal: auto, graphs, fused, layers"),
        ({"decode": "graphs", "device": "cpu"}, "decode graphs needs a CUDA device"),
        ({"attention": "triton", "device": "cpu"}, "attention triton needs a CUDA device; legal here: auto, torch"),
        ({"transport": "p2p", "device": "cpu"}, "transport p2p needs CUDA devices; legal here: auto, gloo, mpi, shm"),
        ({"transport": "mpi"}, "transport mpi needs ranks that mpirun started: name launcher mpi"),
        ({"ep": 2}, "ep 2: smollm2 has no experts that ranks could share; leave ep out"),
        ({"request_tokens": 0}, "request_tokens is 0, legal: a whole number of at least 1"),
        ({"attention": "x"}, "attention 'x' is unknown, legal: auto, triton, flashinfer, torch"),
        ({"transport": "x"}, "transport 'x' is unknown, legal: auto, gloo, nccl, mpi, shm, p2p, flashinfer"),
        ({"transport": "fake"}, "transport fake has no peers in other processes"),
        ({"transport": "threads"}, "transport threads has no peers in other processes"),
        ({"cache_tokens": 15}, "so that 16 is the least here"),
        ({"cache_tokens": 63, "device": "cuda"}, "so that 64 is the least here"),
        ({"ray_address": "auto"}, "the Ray address 'auto' has no effect with launcher local"),
        ({"tp": 0}, "tp 0: must be a whole number of at least 1"),
        ({"attn_dp": 0}, "attn_dp 0: must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met_are_refused_before_any_rank_starts(monkeypatch, option, text):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    with pytest.raises(ValueError, match=text):
        LLM("smollm2", **{"tp": 2, **option})


def test_the_folder_of_traces_is_made_before_any_rank_starts(monkeypatch, tmp_path):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/traces: no folder can be made there: Not a directory"):
        LLM("smollm2", trace=str(tmp_path / "file" / "traces"))
    with pytest.raises(TypeError):
        LLM("smollm2", trace=str(tmp_path / "new" / "traces"))
    assert (tmp_path / "new" / "traces").is_dir()


def test_a_call_that_breaks_off_leaves_its_trace_and_no_profiler(tmp_path):
    session = Session.__new__(Session)
    session._trace, session.device = str(tmp_path), "cpu"
    session.context = SimpleNamespace(info=SimpleNamespace(rank=0))
    session.engine = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), session._traced():
        raise ZeroDivisionError
    assert not torch.autograd._profiler_enabled()
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json.gz"]


def test_a_session_lets_graphs_go_before_the_groups_whose_calls_they_hold():
    closed = []
    session = Session.__new__(Session)
    session.engine, session._stack = SimpleNamespace(close=lambda: closed.append("graphs")), ExitStack()
    session._stack.callback(closed.append, "groups")
    session.close()
    assert closed == ["graphs", "groups"]
    session.engine, session._stack = SimpleNamespace(close=lambda: 1 / 0), ExitStack()
    session._stack.callback(closed.append, "groups, whatever became of the graphs")
    with pytest.raises(ZeroDivisionError):
        session.close()
    assert closed[2:] == ["groups, whatever became of the graphs"]


def test_layouts_that_do_not_fit_are_refused_before_any_rank_starts():
    with pytest.raises(ValueError, match="tp 99 does not fit"):
        LLM("smollm2", tp=99)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LLM("nowhere", tp=2)
    with pytest.raises(ValueError, match="unknown launcher 'warp'; legal: local"):
        LLM("smollm2", tp=2, launcher="warp")
