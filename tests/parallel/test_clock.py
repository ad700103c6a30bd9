"""Times of an engine's steps, the bytes that they read, and traces of them."""

import gzip
import json
import time
from itertools import count

import pytest
import torch
from shapes import GPT_OSS, LLAMA

from shardwise.comm import watch
from shardwise.comm.rank import current_groups
from shardwise.parallel.chrome_trace import COLLECTIVES_ROW, DECODE_STEPS, ChromeTrace, decode_work
from shardwise.parallel.clock import Clock, mean
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.parallel.trace import DECODE, PREFILL, SAMPLE, SCHEDULE, Watcher, span, watched, watched_by
from shardwise.parallel.traffic import copy_bandwidth, step_bytes
from shardwise.sharding.checkpoint.resolve import random_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

pytestmark = pytest.mark.alone
NEW_TOKENS = 10
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture
def shape(tmp_path):
    def write(config: dict):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return path

    return write


def on_ranks(path, layout, body):
    made = plan(path, layout)

    def rank():
        return body(Engine(random_checkpoint(path), made, current_groups()))

    return run_threads(layout.world, rank, layout=layout)


def test_every_step_is_counted_and_its_parts_fit_into_it(shape):
    def body(engine):
        engine.generate([[1]], PARAMS)  # nobody looks yet
        clock = Clock(engine.device, engine.groups.world.rank)
        with watched_by(clock):
            engine.generate([[1, 2, 3], [4, 5]], PARAMS)
        engine.generate([[1]], PARAMS)  # nobody looks any more
        return clock.steps()

    for steps in on_ranks(shape(LLAMA), ParallelLayout(tp=2), body):
        assert [len(steps[kind]) for kind in (PREFILL, DECODE)] == [1, NEW_TOKENS - 1]
        for each in (*steps[PREFILL], *steps[DECODE]):
            assert 0 < each.schedule + each.launch + each.wait <= each.wall and each.device is None
            assert 0 < each.collectives < each.wall


def test_a_step_launched_ahead_of_the_last_ones_tokens_keeps_its_own_times(monkeypatch):
    passed = 0
    monkeypatch.setattr(watch, "now", lambda: passed)
    clock = Clock(torch.device("cpu"))
    for name in (SCHEDULE, PREFILL, SAMPLE, SCHEDULE, DECODE, SCHEDULE, DECODE, SAMPLE, SCHEDULE, DECODE, SAMPLE):
        clock.begin(name)
        passed += 3_000_000 if name == PREFILL else 1_000_000
        clock.end(name)
    steps = clock.steps()
    assert [len(steps[kind]) for kind in (PREFILL, DECODE)] == [1, 2]  # the last launch was never waited for
    assert steps[PREFILL][0].launch == 0.003 and all(step.launch == 0.001 for step in steps[DECODE])
    assert steps[DECODE][0].wall > steps[DECODE][1].wall


def test_only_who_asks_for_the_routing_is_waited_for():
    class Listener(Watcher):
        def routed(self, ids):
            pass

    assert not watched()
    with watched_by(Clock(torch.device("cpu"))):
        assert not watched()
        with watched_by(Listener()):
            assert watched()
            with watched_by(None):
                assert not watched()


def test_the_mean_of_no_steps_is_none_and_spans_cost_nobody_anything():
    assert mean([]) is None
    seconds = []
    for _ in range(20):  # the quickest of them was not interrupted
        begin = time.perf_counter()
        for _ in range(100):
            with span(DECODE):
                pass
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.01


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, moe_ep=2)], ids=str)
def test_a_step_reads_dense_weights_the_chosen_experts_and_the_cache(shape, layout):
    path = shape(GPT_OSS)
    made = plan(path, layout)

    def body(engine):
        return step_bytes(
            engine.decoder, made, engine.groups.world.rank, batch=2, context=8, cache_itemsize=4
        ), engine.stats()

    for rank, (read, stats) in enumerate(on_ranks(path, layout, body)):
        shards = {s.name: s for s in made.shards(rank)}
        table = shards["model.embed_tokens.weight"]
        assert read.dense + read.experts == stats.weight_bytes - 4 * table.local_shape[0] * table.local_shape[1]
        local = len(made.experts(rank, made.model.layers[0].feed_forward[0].expert_axis))
        width, hidden = 64, 64
        assert read.experts == 2 * local * 4 * (3 * width * hidden + 2 * width + hidden * (layout.moe_tp == 1))
        assert read.touched == pytest.approx(1 - (3 / 5) ** 2)
        kv_heads = shards["model.layers.0.self_attn.k_proj.weight"].local_shape[0]
        assert read.cache == 2 * 4 * 2 * kv_heads * (8 + 4)  # sequences, bytes, K and V; a full and a windowed layer
        assert read.total == read.dense + read.experts * read.touched + read.cache


def test_memory_copies_at_some_speed():
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


def test_a_trace_has_the_spans_and_collectives_of_a_few_steps_under_the_ranks_number(shape, tmp_path, monkeypatch):
    now, calls = watch.now, count(1)

    def interrupted():
        """Another process has the core for a while, between two looks at two clocks."""
        moment = now()
        if next(calls) in (3, 9):
            time.sleep(0.02)
        return moment

    def body(engine):
        rank = engine.groups.world.rank
        if rank:  # the profiler is the process's, and ranks are threads here
            engine.generate([[1, 2, 3]], PARAMS)
            return None
        with monkeypatch.context() as patch:
            patch.setattr(watch, "now", interrupted)
            trace = ChromeTrace(tmp_path / "traces", rank, "cpu", engine.device)
        with watched_by(trace):
            engine.generate([[1, 2, 3]], PARAMS)
        return trace.path

    path, _ = on_ranks(shape(LLAMA), ParallelLayout(tp=2), body)
    assert path.name == "rank-0.json.gz" and path.stat().st_size < 1 << 20
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["pid"] for event in events} == {0}
    spans = [e for e in events if e.get("cat") == "user_annotation"]
    assert [e["name"] for e in sorted(spans, key=lambda e: e["ts"])] == [
        *(SCHEDULE, PREFILL, SAMPLE),
        *(SCHEDULE, DECODE, SAMPLE) * DECODE_STEPS,
    ]
    calls = [e for e in events if e.get("tid") == COLLECTIVES_ROW and e["ph"] == "X"]
    inside = [
        call
        for call in calls
        if any(s["ts"] - 50 <= call["ts"] and call["ts"] + call["dur"] <= s["ts"] + s["dur"] + 50 for s in spans)
    ]
    assert len(inside) >= DECODE_STEPS * 2 * LLAMA["num_hidden_layers"] and len(inside) == len(calls)
    assert any(e["name"] == "aten::mm" for e in events)


def test_device_work_is_that_of_decode_steps(tmp_path):
    def event(name, begin, duration, cat="user_annotation"):
        return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration}

    events = [
        event(PREFILL, 0, 10),
        event("gemm", 5, 3, "kernel"),
        event(SAMPLE, 12, 8),
        event(SCHEDULE, 21, 1),
        event(DECODE, 23, 10),
        event(DECODE, 33, 1),  # launched ahead
        event("gemm", 25, 4, "kernel"),
        event(SAMPLE, 34, 6),
        event("gemm", 41, 4, "kernel"),
        event("gemm", 46, 4, "kernel"),
        event("Memcpy DtoH", 50, 1, "gpu_memcpy"),
        event("aten::mm", 44, 1, "cpu_op"),
        event(SAMPLE, 42, 15),
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    work = decode_work(path)
    assert work.steps == 1 and work.seconds == pytest.approx(17e-6)
    assert work.by_name["gemm"] == (2, pytest.approx(8e-6)) and work.by_name["Memcpy DtoH"][0] == 1
    assert work.overlapped == 0


def test_kernels_that_wait_beside_the_one_before_are_busy_only_from_its_end(tmp_path):
    def event(name, begin, end, cat="user_annotation"):
        return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin}

    spans = [event(DECODE, 0, 1), event(SAMPLE, 2, 10), event(DECODE, 11, 12), event(SAMPLE, 13, 30)]
    kernels = [event("a", 12, 16, "kernel"), event("b", 13, 20, "kernel"), event("c", 14, 19, "kernel")]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*kernels, *spans]}).encode()))
    work = decode_work(path)
    seconds = {name: spent for name, (_, spent) in work.by_name.items()}
    assert seconds == {"a": pytest.approx(4e-6), "b": pytest.approx(4e-6), "c": 0}  # 8 us from 12 to 20
    assert work.overlapped == pytest.approx(8e-6)
