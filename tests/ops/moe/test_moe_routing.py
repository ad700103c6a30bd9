"""Routing kernels: the order of pairs, the table of blocks, ties, and the weighted sum."""

import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from shardwise.ops import workspace
from shardwise.ops.moe.mxfp4 import mxfp4_moe
from shardwise.ops.moe.routing import Routing, combine, group_pairs, most_blocks, route_tokens
from shardwise.ops.triton_support import interpreting
from shardwise.ops.workspace import Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not (interpreting() or DEVICE == "cuda"), reason="needs Triton's interpreter or a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


def grouped(ids, first, local, block):
    """(order, blocks) as lists, with the tail beyond what the kernel wrote still poisoned."""
    pairs = ids.numel()
    order = torch.full((pairs,), -7, dtype=torch.int32, device=DEVICE)
    blocks = torch.full((1 + 3 * most_blocks(pairs, local, block),), -7, dtype=torch.int32, device=DEVICE)
    group_pairs(Routing(ids.to(DEVICE), ids.to(DEVICE).float(), order, blocks, first, local), block)
    return order.tolist(), blocks.tolist()


def expected(ids, first, local, block):
    flat = ids.flatten().tolist()
    order = [pair for e in range(local) for pair, value in enumerate(flat) if value - first == e]
    table, position = [], 0
    for e in range(local):
        count = sum(value - first == e for value in flat)
        table += [part for start in range(0, count, block) for part in (e, position + start, position + count)]
        position += count
    return order, [len(table) // 3, *table]


@pytest.mark.parametrize(
    "tokens,top_k,total,first,local",
    [(1, 1, 4, 0, 4), (50, 3, 9, 0, 9), (50, 3, 9, 4, 3), (9, 2, 6, 5, 1), (300, 3, 9, 4, 3), (500, 3, 40, 4, 33)],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_are_sorted_by_expert_and_cut_in_blocks(tokens, top_k, total, first, local, dtype):
    ids = torch.randint(-1, total + 1, (tokens, top_k), dtype=dtype)
    order, blocks = grouped(ids, first, local, 16)
    wanted_order, wanted_blocks = expected(ids, first, local, 16)
    assert order[: len(wanted_order)] == wanted_order and set(order[len(wanted_order) :]) <= {-7}
    assert blocks[: len(wanted_blocks)] == wanted_blocks and set(blocks[len(wanted_blocks) :]) <= {-7}


def test_more_pairs_than_a_program_reads_at_once():
    ids = torch.randint(0, 3, (4500, 2))
    order, blocks = grouped(ids, 0, 3, 128)
    assert (order, blocks[: 3 * blocks[0] + 1]) == expected(ids, 0, 3, 128)


def test_the_most_blocks_are_enough_for_any_counts():
    for counts in ([1] * 8, [129, 1, 1], [0, 0, 256], [127, 128, 1]):
        needed = sum(-(-count // 128) for count in counts)
        assert needed <= most_blocks(sum(counts), len(counts), 128)


def router_only(x, weight, bias, top_k, first, local):
    """(ids, weights, order, blocks) of the router launch."""
    space = Workspace((x.device, "test"))
    routing = route_tokens(space, x, weight, bias, top_k, first, local, 16)
    return routing.ids, routing.weights, routing.order.tolist(), routing.blocks.tolist()


@pytest.mark.parametrize("tokens", [1, 15, 16, 40])
def test_the_router_selects_and_groups(tokens):
    x = torch.randn(tokens, 48, device=DEVICE, dtype=torch.float16)
    weight, bias = torch.randn(9, 48, device=DEVICE, dtype=torch.float16), torch.randn(9, device=DEVICE)
    ids, weights, order, blocks = router_only(x, weight, bias, 3, 2, 5)
    logits = x.double() @ weight.double().T + bias.double()
    values, wanted = logits.topk(3)
    assert torch.equal(ids.long(), wanted)
    torch.testing.assert_close(weights.double(), values.softmax(-1), atol=1e-5, rtol=1e-4)
    wanted_order, wanted_blocks = expected(wanted, 2, 5, 16)
    assert order[: len(wanted_order)] == wanted_order and blocks[: len(wanted_blocks)] == wanted_blocks


def test_equal_logits_go_to_the_lower_expert_and_counters_are_reset():
    x, weight = torch.zeros(3, 32, device=DEVICE), torch.zeros(5, 32, device=DEVICE)
    for _ in range(2):
        ids, weights, _, _ = router_only(x.half(), weight.half(), torch.zeros(5, device=DEVICE), 2, 0, 5)
        assert ids.tolist() == [[0, 1]] * 3 and weights.eq(0.5).all()


def test_the_sum_skips_what_was_never_written():
    ids = torch.tensor([[0, 7], [7, 9], [1, 0]], device=DEVICE)
    values = torch.randn(2, 6, 40, device=DEVICE)
    values[:, [1, 2, 3]] = torch.nan
    weights = torch.rand(3, 2, device=DEVICE)
    empty = torch.empty(0, dtype=torch.int32, device=DEVICE)
    got = combine(values, Routing(ids, weights, empty, empty, 0, 2), torch.float32)
    summed = values.sum(0)
    wanted = torch.stack(
        [summed[0] * weights[0, 0], torch.zeros(40, device=DEVICE), (summed[4:6] * weights[2, :, None]).sum(0)]
    )
    torch.testing.assert_close(got, wanted)
    assert got[1].eq(0).all()


def test_scratch_is_kept_for_few_tokens_and_never_shared_between_threads():
    device = torch.device("cpu")
    one = Workspace.of(device, 3)
    assert Workspace.of(device, 3) is one and Workspace.of(device, 4) is not one
    assert one.take("a", (2, 2), torch.int32) is one.take("a", (2, 2), torch.int32)
    assert Workspace.of(device, 1000) is not Workspace.of(device, 1000)
    others = []
    thread = threading.Thread(target=lambda: others.append(Workspace.of(device, 3)))
    thread.start()
    thread.join()
    assert others[0] is not one
    assert one.counters(10) is one.counters(900) and one.counters(5000).eq(0).sum() == 5000


def test_streams_and_threads_count_in_rows_of_their_own():
    rows = [Workspace((torch.device("cpu"), stream)).counters(4) for stream in range(40)]
    assert len({row.data_ptr() for row in rows}) == 40
    again = [Workspace((torch.device("cpu"), stream)).counters(4) for stream in range(40)]
    assert all(one is other for one, other in zip(rows, again, strict=True))


def test_a_first_call_inside_a_capture_brings_its_own_zeros(monkeypatch):
    def body():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        device = torch.device("cuda")
        assert workspace._row((device, 1)) is None
        row = torch.zeros(4)
        workspace._kept("free counters")[device] = [row]
        found.append(workspace._row((device, 1)) is row and workspace._row((device, 1)) is row)

    found = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(("stream", "capturing", "stays"), [(7, True, True), (7, False, False), (0, True, False)])
def test_what_a_graph_was_captured_with_outlives_the_thread(monkeypatch, stream, capturing, stays):
    device = torch.device("cuda", 0)

    def body():
        workspace._kept("free counters")[device] = [torch.zeros(4)]
        space = Workspace.of(device, 3)
        found.extend(map(weakref.ref, (space, space.counters(4))))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))
    monkeypatch.setattr(workspace, "capturing", lambda: capturing)
    monkeypatch.setattr(workspace, "_HELD", set())
    found = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert [one() is not None for one in found] == [stays, stays]


def test_sizes_beyond_32_bit_offsets_are_refused():
    from shardwise.ops.moe.mxfp4_layout import pack_mxfp4
    from shardwise.ops.quantization.mxfp4 import quantize_mxfp4

    packed = pack_mxfp4(*quantize_mxfp4(torch.randn(1, 64, 32)), torch.zeros(1, 64), paired=True)
    tokens = torch.empty(1 << 25, 32, device="meta")
    with pytest.raises(ValueError, match=r"exceed 2\*\*31"):
        mxfp4_moe(tokens, torch.empty(1, 32), torch.empty(1), 1, packed, packed, 1.0, 1.0, 0)
