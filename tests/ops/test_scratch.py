"""Memory that planned calls keep: who shares it, and who must not."""

import threading

import pytest
import torch

from shardwise.ops import scratch
from shardwise.ops.registry import FLASHINFER
from shardwise.ops.scratch import KEPT_TOKENS, Scratch

GPU = torch.device("cuda", 0)


@pytest.fixture
def stream(monkeypatch):
    """The current stream's handle, in a list, and whether it captures."""
    state = {"handle": 7, "capturing": False}
    monkeypatch.setattr(scratch, "raw_stream", lambda: lambda index: state["handle"])
    monkeypatch.setattr(scratch, "capturing", lambda: state["capturing"])
    return state


def test_calls_of_one_stream_and_thread_share(stream):
    kept = Scratch(GPU, KEPT_TOKENS, object)
    assert kept.take() is kept.take()
    first, stream["handle"] = kept.take(), 8
    second = kept.take()
    assert second is not first
    stream["handle"] = 7
    assert kept.take() is first
    taken = []
    thread = threading.Thread(target=lambda: taken.append(kept.take()))
    thread.start()
    thread.join()
    assert taken[0] not in (first, second)


def test_captures_share_nothing(stream):
    kept = Scratch(GPU, 1, object)
    stream["capturing"] = True
    assert kept.take() is not kept.take()
    stream["capturing"] = False
    assert kept.take() is kept.take()


@pytest.mark.parametrize(("device", "tokens"), [(GPU, KEPT_TOKENS + 1), (torch.device("cpu"), 1)])
def test_many_tokens_and_cpus_keep_nothing(stream, device, tokens):
    kept = Scratch(device, tokens, object)
    assert kept.take() is not kept.take()


@pytest.mark.gpu
@pytest.mark.skipif(not FLASHINFER.state[0], reason=FLASHINFER.state[1])
def test_streams_and_graphs_of_one_operator_do_not_disturb_each_other():
    """The same layout on two streams and in two graphs, all under way at once, each with its own numbers."""
    import samples_mamba
    from mamba_oracle import Batch

    batch = Batch((), 4, (0, 1, 2, 3), ())
    operator = torch.ops.auto_deploy.flashinfer_cached_ssm
    streams = [torch.cuda.Stream() for _ in range(4)]
    calls, results, expected, graphs = [], [], [], []
    for seed in range(4):
        torch.manual_seed(seed)
        build = samples_mamba.cached_ssm_args("x", batch, 64, 8, 64, 128, 16, torch.bfloat16, torch.float32)
        calls.append(build("cuda"))
        args = [*calls[-1]]
        for call in operator, torch.ops.auto_deploy.triton_cached_ssm:  # the first is compiled before a capture
            args[14] = calls[-1][14].clone()
            right = call(*args)
        expected.append(right)
    states = [args[14].clone() for args in calls]
    for args in calls[2:]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(operator(*args))
        graphs.append(graph)
    for _ in range(50):
        for args, state in zip(calls, states, strict=True):
            args[14].copy_(state)
        torch.cuda.synchronize()
        eager = []
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if number < 2:
                    eager.append(operator(*calls[number]))
                else:
                    graphs[number - 2].replay()
        torch.cuda.synchronize()
        for result, right in zip(eager + results, expected, strict=True):
            torch.testing.assert_close(result, right, rtol=2e-2, atol=2e-2)
