"""FlashInfer attention: with FlashInfer where there is a GPU, elsewhere with a stand-in of the same interface."""

import flashinfer_double
import pytest
import torch
from oracles_attention import Step
from paging import PAGE_SIZE, Paged

from shardwise.ops.attention import flashinfer as ours
from shardwise.ops.attention import planner as planning
from shardwise.ops.attention import positions
from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.attention.flashinfer import (
    flashinfer_attention_mha_with_cache,
    flashinfer_attention_prepare_metadata,
)
from shardwise.ops.attention.planner import (
    DecodeFamily,
    Planner,
    decode_graphs,
    exact_metadata,
    planner,
    prefill_starts,
    replan_decode,
    select_pages,
    without_padding,
)
from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.ops.metadata_reports import raise_report
from shardwise.ops.registry import TRITON, OperatorUnavailable, operators

OP = torch.ops.auto_deploy.flashinfer_attention_mha_with_cache
INFO = next(info for info in operators() if info.name == "flashinfer_attention_mha_with_cache")
REAL, WHY = INFO.availability()
DEVICE = "cuda" if REAL else "cpu"


def runs_anywhere(test):
    return pytest.mark.gpu(test) if REAL else test


STEPS = {
    "prefill": Step([33, 5], [0, 0], [0, 1]),
    "chunked prefill": Step([7, 20], [30, 3], [0, 1]),
    "decode": Step([1, 1, 1], [70, 0, 15], [0, 1, 2], decode=3),
    "mixed": Step([9, 40, 1, 1], [20, 0, 65, 16], [0, 1, 2, 3], decode=2),
    "zero length": Step([4, 0, 1], [12, 5, 3], [0, 1, 2], decode=1),
    "padding": Step([3, 1, 1], [0, 9, 31], [0, 1, 2], decode=2, padding=4),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", ["attention", "mla"])
def test_metadata_names_sequence_and_position_of_every_token(name, family):
    step = STEPS[name]
    operator = getattr(torch.ops.auto_deploy, f"flashinfer_{family}_prepare_metadata")
    arguments = Paged.of(step).metadata_inputs(step, "cpu")
    sequences, positions = operator(*arguments)
    expected = [
        (i, past + t) for i, (n, past) in enumerate(zip(step.lengths, step.past, strict=True)) for t in range(n)
    ] + [(-1, -1)] * step.padding
    assert sequences.dtype == positions.dtype == torch.int32
    assert list(zip(sequences.tolist(), positions.tolist(), strict=True)) == expected
    torch.library.opcheck(operator, arguments)


needs_triton = pytest.mark.skipif(not TRITON.state[0], reason="needs a GPU, or triton's interpreter")


@runs_anywhere
@needs_triton
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", STEPS)
def test_the_metadata_kernel_names_the_same(name, index):
    step = STEPS[name]
    ids, info, bounds, lengths = Paged.of(step).metadata_inputs(step, DEVICE)
    batch = read_batch("x", info)
    expected = positions._by_torch(batch, ids, bounds, lengths)
    tensors = ids, bounds.to(index), lengths.to(index)
    result = positions._by_kernel(batch, *tensors)("x", *tensors)
    assert all(a.dtype == torch.int32 and torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@runs_anywhere
@needs_triton
def test_the_metadata_kernel_with_many_sequences():
    lengths = torch.tensor([1 + i % 5 for i in range(300)])
    bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0), lengths.sum() + torch.arange(1, 41)))
    batch, total = Batch(300, int(lengths.sum()), 40), torch.cat((lengths + 7, torch.arange(20, 60)))
    ids, bounds, total = (t.to(DEVICE) for t in (torch.zeros(1, batch.tokens + 3), bounds, total))
    expected = positions._by_torch(batch, ids, bounds, total)
    result = positions._by_kernel(batch, ids, bounds, total)("x", ids, bounds, total)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@runs_anywhere
@needs_triton
@pytest.mark.parametrize("bounds", [[0, 9, 4, 12], [3, 4, 9, 12], [0, 4, 9, 11], [0, -5, 2**31 - 1, 12]])
def test_bad_bounds_name_positions_of_sequences_and_are_reported(bounds):
    batch, lengths = Batch(3, 12, 1), torch.tensor([20, 30, 5, 7], device=DEVICE)
    ids, bounds = torch.zeros(1, 13, device=DEVICE), torch.tensor([*bounds, 13], device=DEVICE)
    owner, position = positions._by_kernel(batch, ids, bounds, lengths)("bad bounds", ids, bounds, lengths)
    assert all(0 <= p < lengths[i] for i, p in zip(owner.tolist(), position.tolist(), strict=True))
    with pytest.raises(ValueError, match="cu_seqlen"):
        raise_report("bad bounds")


def test_metadata_makes_plans_stale_and_checks_its_arguments():
    step = STEPS["mixed"]
    owner = planner("attention", torch.device("cpu"))
    owner.planned(("prefill", "test"), lambda: "wrapper", lambda w: None)
    arguments = Paged.of(step).metadata_inputs(step, "cpu")
    flashinfer_attention_prepare_metadata(*arguments)
    assert not owner._planned
    with pytest.raises(ValueError, match="counts 51 tokens, position_ids holds 5"):
        flashinfer_attention_prepare_metadata(torch.zeros(5), *arguments[1:])
    bad = torch.tensor([0, 40, 9, *arguments[2][3:].tolist()])
    with pytest.raises(ValueError, match="cu_seqlen begins .0, 40, 9.; it must ascend from 0 to the 49 prefill tokens"):
        flashinfer_attention_prepare_metadata(*arguments[:2], bad, arguments[3])
    with pytest.raises(ValueError, match="cu_seqlen has 4 entries; legal: 5"):
        flashinfer_attention_prepare_metadata(*arguments[:2], arguments[2][:4], arguments[3])


class Recorder:
    """Stands for FlashInfer's wrappers: notes what was created and planned."""

    def __init__(self):
        self.created, self.plans = [], []
        self.family = DecodeFamily(self.create, self.plan)

    def create(self, owner, buffers):
        self.created.append(buffers)
        return f"wrapper {len(self.created)}"

    def plan(self, parameters, wrapper, pages):
        assert parameters == "layer"
        self.plans.append((wrapper, pages.indptr.tolist(), pages.indices.tolist()))


def pages_of(paged):
    return paged.cu_num_pages_host, paged.cache_loc, paged.last_page_len_host, paged.seq_len_with_cache_host


def test_metadata_that_lies_apart_is_made_dense():
    batch, counts = Batch(1, 3, 2), (5, 5, 4, 3)
    dense = [torch.arange(count, dtype=torch.int32) for count in counts]
    apart = [torch.stack((entries, entries), 1)[:, 0] for entries in dense]
    assert exact_metadata(batch, *dense) and not exact_metadata(batch, *apart)
    for made, entries in zip(without_padding(batch, *apart), dense, strict=True):
        assert made.is_contiguous() and made.equal(entries)
    paged = Paged.of(STEPS["mixed"])
    tables = pages_of(paged)
    selected = select_pages(0, 2, *[torch.stack((table, table), 1)[:, 0] for table in tables])
    for made, entries in zip(vars(selected).values(), vars(select_pages(0, 2, *tables)).values(), strict=True):
        assert made.is_contiguous() and made.equal(entries)


def test_page_tables_of_other_types_are_refused():
    paged = Paged.of(STEPS["mixed"])
    paged.cache_loc = paged.cache_loc.long()
    with pytest.raises(TypeError, match="cache_loc.* are torch.int32, torch.int64, .*; legal: int32"):
        select_pages(0, 2, *pages_of(paged))


def test_page_tables_that_are_too_short_are_refused():
    paged = Paged.of(STEPS["mixed"])
    pages = int(paged.cu_num_pages_host[2])
    paged.cache_loc = paged.cache_loc[: pages - 1]
    with pytest.raises(ValueError, match=rf"legal for 2 sequences: \[3, {pages}, 2, 2\] entries and more"):
        select_pages(0, 2, *pages_of(paged))


def test_bounds_of_other_tokens_are_refused():
    batch = Batch(2, 49, 2)
    assert prefill_starts("op", batch, torch.tensor([0, 9, 49, 50, 51], dtype=torch.int32)).tolist() == [0, 9, 49]
    with pytest.raises(ValueError, match="op: cu_seqlen begins .0, 9, 60.; it must ascend from 0 to the 49 prefill"):
        prefill_starts("op", batch, torch.tensor([0, 9, 60, 61, 62], dtype=torch.int32))


def test_decode_is_planned_once_a_step_over_its_own_pages():
    recorder, owner, paged = Recorder(), Planner(torch.device("cpu")), Paged.of(STEPS["mixed"])
    step = recorder.family, "layer", Batch(2, 49, 2), 100, pages_of(paged)
    for _ in range(3):
        owner.decode_wrapper(*step)
    assert recorder.created == [None]
    assert recorder.plans == [("wrapper 1", [0, 5, 7], paged.cache_loc[5:12].tolist())]
    owner._planned.clear()
    owner.decode_wrapper(*step)
    assert len(recorder.created) == 1 and len(recorder.plans) == 2


def test_graph_wrappers_are_made_for_each_batch_size_and_replanned_by_it():
    recorder, paged = Recorder(), Paged.of(STEPS["decode"])
    host, owner = pages_of(paged), planner("attention", torch.device("cpu"))
    with decode_graphs():
        for count in (3, 2, 3):
            owner.decode_wrapper(recorder.family, "layer", Batch(0, 0, count), 100, host)
    assert [len(buffers.last_page_len) for buffers in recorder.created] == [3, 2]
    assert not owner.graphs
    replan_decode(*host)
    assert [wrapper for wrapper, *_ in recorder.plans] == ["wrapper 1", "wrapper 2", "wrapper 1"]
    planner("mla", torch.device("cpu"))  # a family without graphs is in nobody's way
    replan_decode(*host)
    with pytest.raises(ValueError, match="no decode graph of batch size 1"):
        replan_decode(host[0][:2], host[1], host[2][:1], host[3][:1])


def test_graph_wrappers_are_shared_by_caches_up_to_a_power_of_two():
    recorder, host = Recorder(), pages_of(Paged.of(STEPS["decode"]))
    owner = Planner(torch.device("cpu"), graphs=True)
    for page_count in (*range(65, 129), 129, 200, 100):
        owner.decode_wrapper(recorder.family, "layer", Batch(0, 0, 3), page_count, host)
    assert [len(buffers.indices) for buffers in recorder.created] == [128, 256]


@pytest.mark.skipif(REAL, reason="available here")
def test_without_flashinfer_the_error_names_what_to_call():
    empty = torch.zeros(0)
    with pytest.raises(
        OperatorUnavailable, match="call auto_deploy::triton_attention_flattened_mha_with_cache instead"
    ):
        OP(*[empty] * 14, None, 1.0, 1.0)


@pytest.fixture
def flashinfer(monkeypatch):
    """FlashInfer itself where it runs, else the stand-in; planners of its own, which kept plans hold."""
    monkeypatch.setattr(planning, "_PLANNERS", {})
    ours._PLANS.clear()
    if not REAL:
        flashinfer_double.install(monkeypatch)
        monkeypatch.setattr(planning, "WORKSPACE_BYTES", 16)
        monkeypatch.setattr(ours, "_backend", lambda device: "fa2")
    yield
    ours._PLANS.clear()


def reference(step, q, k, v, paged, kv_cache, scales=(1.0, 1.0), scale=None):
    """The same step over an unpaged copy of the cache, on the CPU in float32."""
    heads, size = kv_cache.shape[2], kv_cache.shape[4]
    longest = max(n + past for n, past in zip(step.lengths, step.past, strict=True))
    caches = [torch.zeros(len(step.lengths), longest, heads, size) for _ in range(2)]
    for which, (cache, factor) in enumerate(zip(caches, scales, strict=True)):
        paged_cache = kv_cache[:, which].transpose(1, 2).float() * factor
        for i, past in enumerate(step.past):
            cache[i, :past] = paged.gather(paged_cache, i)[:past]
    flat = [x.cpu().float()[None] for x in (q, k, v)]
    info, seq_len, input_pos, _, cu_seqlen = step.metadata()
    slots = torch.arange(len(step.lengths))
    out = torch_cached_attention_with_cache(*flat, info, seq_len, input_pos, slots, cu_seqlen, *caches, scale)
    return out[0], caches


def build(step, paged, heads=8, kv_heads=2, size=64, dtype=torch.bfloat16, cache_dtype=None):
    generator = torch.Generator(device=DEVICE).manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    pages = len(paged.cache_loc) + 2
    tensors = [random(step.tokens, n, size) for n in (heads, kv_heads, kv_heads)]
    return *tensors, random(pages, 2, kv_heads, PAGE_SIZE, size).to(cache_dtype or dtype)


def run(step, paged, q, k, v, kv_cache, k_scale=1.0, v_scale=1.0, flat=False, metadata=None):
    metadata = metadata or flashinfer_attention_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
    q, k, v = (x[None].flatten(2) if flat else x[None] for x in (q, k, v))
    arguments = (q, k, v, *paged.arguments(), *metadata, kv_cache, None, k_scale, v_scale)
    out = (OP if REAL else flashinfer_attention_mha_with_cache)(*arguments)
    assert out.shape == q.shape and out.is_contiguous()
    return out.view(step.tokens, -1, kv_cache.shape[4])


@runs_anywhere
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("flat", [False, True])
def test_operator_equals_reference(flashinfer, name, flat):
    step = STEPS[name]
    paged = Paged.of(step, DEVICE)
    tensors = build(step, paged)
    cpu = Paged.of(step)
    want, caches = reference(step, *tensors[:3], cpu, tensors[3].cpu())
    out = run(step, paged, *tensors, flat=flat)
    torch.testing.assert_close(out.float().cpu(), want, atol=2e-2, rtol=2e-2)
    assert not out[step.tokens - step.padding :].any()
    for which in range(2):
        written = tensors[3][:, which].transpose(1, 2).cpu()
        for i, total in enumerate(cpu.seq_len_with_cache_host.tolist()):
            torch.testing.assert_close(cpu.gather(written, i).float(), caches[which][i, :total])


@runs_anywhere
@pytest.mark.parametrize("dtype,heads,kv_heads,size", [
    (torch.bfloat16, 8, 1, 128), (torch.bfloat16, 4, 4, 256), (torch.float16, 16, 2, 128), (torch.float16, 4, 4, 64),
])  # fmt: skip
@pytest.mark.parametrize("name", ["mixed", "zero length"])
def test_head_sizes_groups_and_dtypes(flashinfer, name, dtype, heads, kv_heads, size):
    step = STEPS[name]
    paged = Paged.of(step, DEVICE)
    tensors = build(step, paged, heads, kv_heads, size, dtype)
    want, _ = reference(step, *tensors[:3], Paged.of(step), tensors[3].cpu())
    out = run(step, paged, *tensors)
    torch.testing.assert_close(out.float().cpu(), want, atol=2e-2, rtol=2e-2)


@runs_anywhere
def test_metadata_longer_than_the_batch_gives_the_same(flashinfer):
    step = STEPS["mixed"]
    paged = Paged.of(step, DEVICE)
    *tensors, kv_cache = build(step, paged)
    metadata = flashinfer_attention_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
    want = run(step, paged, *tensors, kv_cache.clone(), metadata=metadata)
    q, k, v = (x[None] for x in tensors)
    arguments = list(paged.arguments())
    for place in (2, 5):  # cu_num_pages, last_page_len
        arguments[place] = torch.cat((arguments[place], arguments[place][-1:]))
    longer = [torch.cat((each, each[-1:])) for each in metadata]
    call = OP if REAL else flashinfer_attention_mha_with_cache
    assert torch.equal(call(q, k, v, *arguments, *longer, kv_cache, None, 1.0, 1.0).view_as(want), want)


@runs_anywhere
@pytest.mark.parametrize("shift", [0, 1])
def test_slices_of_a_fused_projection(flashinfer, shift):
    """Rows apart from one another, also off the alignment that FlashInfer's vectors need."""
    step = STEPS["mixed"]
    paged = Paged.of(step, DEVICE)
    *tensors, kv_cache = build(step, paged)
    want = run(step, paged, *tensors, kv_cache.clone())
    fused = torch.cat([x.flatten(1) for x in tensors], dim=1)
    fused = torch.cat((fused.new_zeros(len(fused), shift), fused), dim=1)[:, shift:]
    parts = [x.unflatten(1, (-1, 64)) for x in fused.split([8 * 64, 2 * 64, 2 * 64], dim=1)]
    assert not any(x.is_contiguous() for x in parts)
    assert torch.equal(run(step, paged, *parts, kv_cache), want)


@runs_anywhere
@pytest.mark.parametrize("name", ["chunked prefill", "decode"])
def test_fp8_cache_honours_its_scales(flashinfer, name):
    step = STEPS[name]
    paged, scales = Paged.of(step, DEVICE), (0.02, 0.25)
    q, k, v, kv_cache = build(step, paged, cache_dtype=torch.float8_e4m3fn)
    kv_cache = (kv_cache.float() * 20).clamp(-448, 448).to(torch.float8_e4m3fn)
    quantised = [(x.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                 for x, s in zip((k, v), scales, strict=True)]  # fmt: skip
    want, _ = reference(step, q, *quantised, Paged.of(step), kv_cache.cpu(), scales)
    out = run(step, paged, q, k, v, kv_cache, *scales)
    torch.testing.assert_close(out.float().cpu(), want, atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason=WHY)
def test_decode_under_a_cuda_graph_follows_replans(flashinfer):
    first, later = Step([1, 1], [20, 5], [0, 1], decode=2), Step([1, 1], [21, 6], [0, 1], decode=2)
    paged = Paged.of(first, DEVICE)
    tensors = build(first, paged)
    static = [x.clone() for x in tensors]
    inputs = paged.metadata_inputs(first, DEVICE)
    with decode_graphs():
        run(first, paged, *static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            metadata = flashinfer_attention_prepare_metadata(*inputs)
            out = run(first, paged, *static, metadata=metadata)
    for step in (first, later):
        renewed = Paged.of(step)
        want, _ = reference(step, *tensors[:3], renewed, static[3].cpu())
        inputs[3].copy_(renewed.seq_len_with_cache_host)
        paged.last_page_len.copy_(renewed.last_page_len_host)
        replan_decode(renewed.cu_num_pages_host, paged.cache_loc, renewed.last_page_len_host,
                      renewed.seq_len_with_cache_host)  # fmt: skip
        graph.replay()
        torch.testing.assert_close(out.float().cpu(), want, atol=2e-2, rtol=2e-2)


@runs_anywhere
def test_graph_wrappers_give_the_same_and_survive_a_replan(flashinfer):
    step = STEPS["decode"]
    paged = Paged.of(step, DEVICE)
    tensors = build(step, paged)
    want, _ = reference(step, *tensors[:3], Paged.of(step), tensors[3].cpu())
    with decode_graphs():
        first = run(step, paged, *tensors)
        replan_decode(paged.cu_num_pages_host, paged.cache_loc, paged.last_page_len_host, paged.seq_len_with_cache_host)
        second = run(step, paged, *tensors)
    for out in (first, second):
        torch.testing.assert_close(out.float().cpu(), want, atol=2e-2, rtol=2e-2)


@runs_anywhere
def test_bad_arguments(flashinfer):
    step = STEPS["mixed"]
    paged = Paged.of(step, DEVICE)
    q, k, v, kv_cache = build(step, paged)
    with pytest.raises(TypeError, match="q is torch.float32; legal: float16, bfloat16"):
        run(step, paged, q.float(), k.float(), v.float(), kv_cache)
    with pytest.raises(ValueError, match="head size 32; legal: 64, 128, 256"):
        run(step, paged, q[..., :32], k[..., :32], v[..., :32], kv_cache[..., :32])
    with pytest.raises(ValueError, match=r"legal: \[pages, 2, Nkv, page_size, D\]"):
        run(step, paged, q, k, v, kv_cache[:, 0])
    with pytest.raises(TypeError, match="kv_cache is torch.float32"):
        run(step, paged, q, k, v, kv_cache.float())
    metadata = flashinfer_attention_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
    paged.cu_seqlen_host = paged.cu_seqlen_host + 1
    with pytest.raises(ValueError, match="flashinfer_attention_mha_with_cache: cu_seqlen begins .1, "):
        run(step, paged, q, k, v, kv_cache, metadata=metadata)


class _Layer(torch.nn.Module):
    def forward(self, q, k, v, kv_cache, inputs, pages):
        metadata = torch.ops.auto_deploy.flashinfer_attention_prepare_metadata(*inputs)
        return OP(q, k, v, *pages, *metadata, kv_cache, None, 1.0, 1.0)


def test_graphs_export_on_any_machine_and_the_fake_tells_the_result(flashinfer):
    step = STEPS["padding"]
    paged = Paged.of(step, DEVICE)
    q, k, v, kv_cache = build(step, paged)
    tensors = [x[None] for x in (q, k, v)]
    arguments = (*tensors, kv_cache, paged.metadata_inputs(step, DEVICE), paged.arguments())
    program = torch.export.export(_Layer(), arguments)
    assert any(node.target is OP.default for node in program.graph.nodes)
    (value,) = (node.args[0][0].meta["val"] for node in program.graph.nodes if node.op == "output")
    out = run(step, paged, q, k, v, kv_cache)[None]
    assert (value.shape, value.dtype, value.stride()) == (out.shape, out.dtype, out.stride())
