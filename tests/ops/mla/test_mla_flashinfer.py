"""FlashInfer MLA: with FlashInfer where there is a GPU, elsewhere with a stand-in of the same interface."""

import flashinfer_double
import pytest
import torch
from oracles_attention import Step
from paging import PAGE_SIZE, Paged

from shardwise.ops.attention import planner as planning
from shardwise.ops.attention.planner import decode_graphs, replan_decode
from shardwise.ops.mla import flashinfer as ours
from shardwise.ops.mla.flashinfer import flashinfer_mla_prepare_metadata, flashinfer_mla_with_cache
from shardwise.ops.mla.reference import torch_cached_mla_with_cache
from shardwise.ops.registry import OperatorUnavailable, operators

OP = torch.ops.auto_deploy.flashinfer_mla_with_cache
INFO = next(info for info in operators() if info.name == "flashinfer_mla_with_cache")
REAL, WHY = INFO.availability()
DEVICE = "cuda" if REAL else "cpu"
CALL = OP if REAL else flashinfer_mla_with_cache
HEADS, NOPE, ROPE, VALUE, RANK = 16 if REAL else 4, 128, 64, 128, 512
STEPS = {
    "prefill": Step([33, 5], [0, 0], [0, 1]),
    "chunked prefill": Step([7, 20], [30, 0], [0, 1]),
    "decode": Step([1, 1, 1], [70, 0, 15], [0, 1, 2], decode=3),
    "mixed": Step([9, 40, 1, 1], [0, 0, 65, 16], [0, 1, 2, 3], decode=2),
    "padding": Step([3, 1, 1], [4, 9, 31], [0, 1, 2], decode=2, padding=4),
}


def runs_anywhere(test):
    return pytest.mark.gpu(test) if REAL else test


@pytest.mark.skipif(REAL, reason="available here")
def test_without_flashinfer_the_error_names_what_to_call():
    with pytest.raises(OperatorUnavailable, match="call auto_deploy::torch_cached_mla_with_cache instead"):
        OP(*[torch.zeros(0)] * 17, None, RANK)


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch):
    """FlashInfer itself where it runs, else the stand-in; planners of its own, which kept plans hold."""
    monkeypatch.setattr(planning, "_PLANNERS", {})
    ours._PLANS.clear()
    if not REAL:
        flashinfer_double.install(monkeypatch)
        monkeypatch.setattr(planning, "WORKSPACE_BYTES", 16)
    yield
    ours._PLANS.clear()


def build(step, pages, dtype=torch.bfloat16):
    generator = torch.Generator(device=DEVICE).manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    tokens = step.tokens
    weight = (random(HEADS * (NOPE + VALUE), RANK).float() / RANK**0.5).to(dtype)
    tensors = (random(1, tokens, HEADS, NOPE), random(1, tokens, HEADS, ROPE), random(1, tokens, RANK),
               random(1, tokens, 1, ROPE), weight)  # fmt: skip
    return tensors, random(pages, PAGE_SIZE, RANK), random(pages, PAGE_SIZE, ROPE)


def joined(ckv_cache, kpe_cache):
    return torch.cat((ckv_cache.cpu().float(), kpe_cache.cpu().float()), dim=-1)


def reference(step, tensors, paged, ckv_cache, kpe_cache):
    """The same step over an unpaged copy of the cache, on the CPU in float32; also that copy."""
    longest = max(n + past for n, past in zip(step.lengths, step.past, strict=True))
    cache = torch.zeros(len(step.lengths), longest, RANK + ROPE).to(ckv_cache.dtype)
    both = joined(ckv_cache, kpe_cache).to(cache.dtype)
    for i, past in enumerate(step.past):
        cache[i, :past] = paged.gather(both, i)[:past]
    cache = cache if cache.dtype == torch.float8_e4m3fn else cache.float()
    info, seq_len, input_pos, _, cu_seqlen = step.metadata()
    metadata = (info, seq_len, input_pos, torch.arange(len(step.lengths)), cu_seqlen)
    return torch_cached_mla_with_cache(*(x.cpu().float() for x in tensors), *metadata, cache), cache


@runs_anywhere
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("quantised", [False, True])
def test_operator_equals_reference(name, quantised):
    step = STEPS[name]
    paged, cpu = Paged.of(step, DEVICE), Paged.of(step)
    tensors, ckv_cache, kpe_cache = build(step, len(paged.cache_loc) + 2)
    if quantised:
        ckv_cache, kpe_cache = ckv_cache.to(torch.float8_e4m3fn), kpe_cache.to(torch.float8_e4m3fn)
    want, cache = reference(step, tensors, cpu, ckv_cache, kpe_cache)
    metadata = flashinfer_mla_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
    out = CALL(*tensors, *paged.arguments(), *metadata, ckv_cache, kpe_cache, None, RANK)
    assert out.shape == (1, step.tokens, HEADS, VALUE)
    torch.testing.assert_close(out.float().cpu(), want, atol=3e-2, rtol=3e-2)
    both = joined(ckv_cache, kpe_cache)
    for i, total in enumerate(cpu.seq_len_with_cache_host.tolist()):
        torch.testing.assert_close(cpu.gather(both, i), cache[i, :total].float())


@runs_anywhere
@pytest.mark.parametrize(
    ("name", "skew", "dtype"),
    [(name, skew, torch.bfloat16) for name in ("chunked prefill", "mixed") for skew in (0, 1, 8)]
    + [("mixed", 8, torch.float8_e4m3fn)],
)
def test_parts_of_wider_rows_give_the_same(name, skew, dtype):
    step = STEPS[name]
    paged = Paged.of(step, DEVICE)
    (q_nope, q_pe, latent, kpe, weight), *caches = build(step, len(paged.cache_loc) + 2)
    caches = [cache.to(dtype) for cache in caches]
    results = []
    for wide in (False, True):
        q, row = (torch.cat((each[..., :skew], each), dim=-1) for each in
                  (torch.cat((q_nope, q_pe), dim=-1), torch.cat((latent, kpe[:, :, 0]), dim=-1)))  # fmt: skip
        parts = (q[..., skew:][..., :NOPE], q[..., skew:][..., NOPE:], row[..., skew:][..., :RANK],
                 row[..., None, skew:][..., RANK:])  # fmt: skip
        ckv_cache, kpe_cache = (cache.clone() for cache in caches)
        metadata = flashinfer_mla_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
        tensors = parts if wide else [part.contiguous() for part in parts]
        out = CALL(*tensors, weight, *paged.arguments(), *metadata, ckv_cache, kpe_cache, None, RANK)
        results.append((out, ckv_cache, kpe_cache))
    (out, *written), (wide_out, *wide_written) = results
    torch.testing.assert_close(out, wide_out, atol=2e-3, rtol=1.6e-2)  # a product may be made in another order
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(written, wide_written, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason=WHY)
def test_decode_under_a_cuda_graph_follows_replans():
    first, later = Step([1, 1], [20, 5], [0, 1], decode=2), Step([1, 1], [21, 6], [0, 1], decode=2)
    paged = Paged.of(first, DEVICE)
    tensors, ckv_cache, kpe_cache = build(first, len(paged.cache_loc) + 2)
    inputs = paged.metadata_inputs(first, DEVICE)

    def step():
        metadata = flashinfer_mla_prepare_metadata(*inputs)
        return CALL(*tensors, *paged.arguments(), *metadata, ckv_cache, kpe_cache, None, RANK)

    with decode_graphs():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    for now in (first, later):
        renewed = Paged.of(now)
        want, _ = reference(now, tensors, renewed, ckv_cache, kpe_cache)
        inputs[3].copy_(renewed.seq_len_with_cache_host)
        paged.last_page_len.copy_(renewed.last_page_len_host)
        replan_decode(renewed.cu_num_pages_host, paged.cache_loc, renewed.last_page_len_host,
                      renewed.seq_len_with_cache_host)  # fmt: skip
        graph.replay()
        torch.testing.assert_close(out.float().cpu(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason=WHY)
def test_layers_of_a_step_share_memory_and_no_results():
    step = STEPS["mixed"]
    paged = Paged.of(step, DEVICE)
    tensors, *caches = build(step, len(paged.cache_loc) + 2)
    layers = [(tensors, caches), ([-each for each in tensors[:4]] + [tensors[4]], [cache.clone() for cache in caches])]
    metadata = flashinfer_mla_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
    want = [reference(step, tensors, Paged.of(step), *caches)[0] for tensors, caches in layers]
    rounds = [[CALL(*tensors, *paged.arguments(), *metadata, *caches, None, RANK) for tensors, caches in layers]
              for _ in range(3)]  # fmt: skip
    for results in rounds:
        for result, expected in zip(results, want, strict=True):
            torch.testing.assert_close(result.float().cpu(), expected, atol=3e-2, rtol=3e-2)


@runs_anywhere
@pytest.mark.parametrize("name", STEPS)
def test_a_weight_that_requires_gradients_is_read_as_any_other(name):
    step = STEPS[name]
    paged = Paged.of(step, DEVICE)
    tensors, *caches = build(step, len(paged.cache_loc) + 2)
    metadata = flashinfer_mla_prepare_metadata(*paged.metadata_inputs(step, DEVICE))
    rest = (*paged.arguments(), *metadata, *caches, None, RANK)
    weight = tensors[4].clone().requires_grad_()
    plain, asking = CALL(*tensors, *rest), CALL(*tensors[:4], weight, *rest)
    assert torch.equal(plain, asking)
    # the dispatcher marks its results as ones without gradients; what it calls leaves no history
    assert not flashinfer_mla_with_cache(*tensors[:4], weight, *rest).requires_grad


@runs_anywhere
def test_bad_arguments():
    step = STEPS["mixed"]
    paged = Paged.of(step, DEVICE)
    tensors, ckv_cache, kpe_cache = build(step, len(paged.cache_loc) + 2)
    metadata = flashinfer_mla_prepare_metadata(*paged.metadata_inputs(step, DEVICE))

    def call(tensors=tensors, ckv=ckv_cache, rank=RANK):
        return CALL(*tensors, *paged.arguments(), *metadata, ckv, kpe_cache, None, rank)

    with pytest.raises(TypeError, match="q_nope is torch.float32"):
        call([x.float() for x in tensors])
    with pytest.raises(ValueError, match=r"ckv_cache has shape .* legal: \[pages, page_size, 512\]"):
        call(ckv=ckv_cache[..., :256])
    with pytest.raises(TypeError, match="ckv_cache is torch.float32"):
        call(ckv=ckv_cache.float())
    with pytest.raises(ValueError, match="kv_lora_rank 256; legal: 512, 64, 512"):
        call(rank=256)
    paged.cu_seqlen_host = paged.cu_seqlen_host + 1
    with pytest.raises(ValueError, match="flashinfer_mla_with_cache: cu_seqlen begins .1, "):
        call()


class _Layer(torch.nn.Module):
    def forward(self, tensors, caches, inputs, pages):
        metadata = torch.ops.auto_deploy.flashinfer_mla_prepare_metadata(*inputs)
        return OP(*tensors, *pages, *metadata, *caches, None, RANK)


def test_graphs_export_on_any_machine_and_the_fake_tells_the_result():
    step = STEPS["padding"]
    paged = Paged.of(step, DEVICE)
    tensors, *caches = build(step, len(paged.cache_loc) + 2)
    inputs = paged.metadata_inputs(step, DEVICE)
    program = torch.export.export(_Layer(), (tensors, tuple(caches), inputs, paged.arguments()))
    assert any(node.target is OP.default for node in program.graph.nodes)
    (value,) = (node.args[0][0].meta["val"] for node in program.graph.nodes if node.op == "output")
    out = CALL(*tensors, *paged.arguments(), *flashinfer_mla_prepare_metadata(*inputs), *caches, None, RANK)
    assert (value.shape, value.dtype, value.stride()) == (out.shape, out.dtype, out.stride())
