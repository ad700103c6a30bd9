import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from shardwise.comm.rank import current_groups
from shardwise.parallel import block_tiles
from shardwise.parallel.block_linear import BlockEmbedding, BlockHead, BlockLinear, planes_of
from shardwise.parallel.engine import Engine
from shardwise.parallel.tokenizer import load_tokenizer
from shardwise.sharding.checkpoint.resolve import open_checkpoint
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads


def stored(dtype, rows, columns):
    """(blocks as a file holds them, the weights they stand for)."""
    kind = GGMLQuantizationType[dtype]
    weight = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    raw = quantize(weight, kind)
    blocks = torch.from_numpy(raw.reshape(rows, columns // 32, -1).copy())
    return blocks, torch.from_numpy(dequantize(raw, kind).reshape(rows, columns))


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q8_0"])
def test_codes_scales_and_zeros_are_the_stored_weights_exactly(dtype):
    blocks, weight = stored(dtype, 16, 96)
    total = torch.zeros(16, 96)
    for codes, scales, zeros in planes_of(dtype, blocks):
        assert codes.min() >= 0 and codes.max() <= 15
        total += ((codes - 8).view(16, -1, 32) * scales[..., None] + zeros[..., None]).flatten(1)
    assert torch.allclose(total, weight, atol=1e-5)


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 64), (5, 64), (80, 320), (80, 48)])
def test_products_are_those_of_the_dequantised_weights(monkeypatch, dtype, tokens, outputs):
    monkeypatch.setattr(block_tiles, "TILE", 96 * 128)  # of 320 outputs the last tile has 64
    blocks, weight = stored(dtype, outputs, 96)
    x, bias = torch.randn(tokens, 96), torch.randn(outputs)
    got = BlockLinear(planes=planes_of(dtype, blocks), bias=bias)(x)
    expected = x.double() @ weight.double().T + bias
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 8e-3  # bfloat16 inputs and scales


@pytest.mark.parametrize("options", [[], [lambda values: values]], ids=["all", "for the best"])
@pytest.mark.parametrize("together", [200, 1])
def test_logits_near_the_best_are_exact(monkeypatch, together, options):
    monkeypatch.setattr(block_tiles, "TILE", 64 * 1000)
    blocks, weight = stored("Q8_0", 4096, 64)
    table = BlockEmbedding(blocks=blocks, vocab=(0, 4096), group=None, dtype=torch.float32)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    head = BlockHead(blocks=blocks, table=table)
    got = torch.cat([head.for_best(some, *options) if options else head(some) for some in x.split(together)])
    expected = x @ weight.T
    best, rows = expected.argmax(1), range(len(x))
    assert torch.equal(got.argmax(1), best)
    assert torch.allclose(got[rows, best], expected[rows, best], rtol=1e-5)


def test_the_form_of_the_packed_codes_is_known_here():
    """Where it is not, products of many rows take the kernel for few: twice as long for prompts."""
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert (block_tiles.panel_width() in (64, 32)) == capable


def test_high_codes_alone_would_often_choose_another_token():
    blocks, weight = stored("Q8_0", 4096, 64)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    high = BlockLinear(planes=planes_of("Q8_0", blocks)).planes[0](x.bfloat16())
    assert (high.argmax(1) == (x @ weight.T).argmax(1)).float().mean() < 0.9


def test_other_storage_types_are_refused():
    with pytest.raises(ValueError, match="blocks of Q6_K, expected Q4_0, Q4_1, Q8_0"):
        planes_of("Q6_K", torch.zeros(1, 1, 210, dtype=torch.uint8))


def test_an_embedding_in_blocks_gives_exact_rows_over_two_ranks():
    blocks, weight = stored("Q8_0", 10, 64)

    def rows():
        group = current_groups().tp
        part = (0, 6) if group.rank == 0 else (6, 10)
        table = BlockEmbedding(blocks=blocks[slice(*part)], vocab=part, group=group, dtype=torch.float32)
        return table(torch.tensor([0, 5, 6, 9, 9]))

    for got in run_threads(2, rows):
        assert torch.equal(got, weight[[0, 5, 6, 9, 9]])


@torch.inference_mode()
def _logits(form, ids):
    from shardwise.parallel.batch import Batch, Span
    from shardwise.parallel.cache import SlotCache

    size = current_groups().world.size
    engine = Engine("smollm2", plan("smollm2", tp=size), current_groups(), weights=form)
    cache = SlotCache(engine.cache_shapes, slots=1, max_length=512, dtype=engine.dtype, device=engine.device)
    token_step, head = engine.runner.token_step, engine.decoder.head
    assert token_step is not None
    rows = [
        head(token_step(Batch([Span(0, place, 1)], [token], engine.device), cache)) for place, token in enumerate(ids)
    ]
    return torch.cat(rows), engine.stats().weight_bytes


@torch.inference_mode()
def _hidden_both_ways(ids):
    """The head's input behind the last of `ids` in 4-bit blocks, by the single-token step and by the layers."""
    from shardwise.parallel.batch import Batch, Span
    from shardwise.parallel.cache import SlotCache

    size = current_groups().world.size
    engine = Engine("smollm2", plan("smollm2", tp=size), current_groups(), weights="native")
    found = []
    for step in (engine.runner.token_step, engine.decoder.hidden):
        cache = SlotCache(engine.cache_shapes, slots=1, max_length=32, dtype=engine.dtype, device=engine.device)
        for place, token in enumerate(ids):
            last = step(Batch([Span(0, place, 1)], [token], engine.device), cache)
        found.append(last.clone())
    return found


def test_the_single_token_step_computes_what_the_layers_do():
    for step, layers in run_threads(2, _hidden_both_ways, [504, 2225, 2104, 2049, 9150, 2014, 19452, 28]):
        assert (step - layers).norm() / layers.norm() < 0.05  # bfloat16 roundings fall differently


def test_the_real_model_in_its_own_blocks_predicts_what_float32_does():
    text = (
        "The river had been rising since dawn, and by noon the lower road was under water. Mara counted the sandbags "
        "again. There were forty-one, which was not enough, and the truck would not come back before dark. She thought "
        "of the mill, of its wheel turning backwards in the flood, and of the old man who had refused to leave it."
    )
    ids = load_tokenizer(open_checkpoint("smollm2")).encode(text)
    [(exact, full_bytes)] = run_threads(1, _logits, "auto", ids)
    for logits, held_bytes in run_threads(2, _logits, "native", ids):
        # Agreement of the most likely tokens needs a longer text than a test has time for (benchmarks/).
        wanted = exact.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean().item()
        assert divergence < 2e-3, f"KL {divergence:.1e}, 6e-4 on 1,460 positions"
        assert held_bytes < full_bytes / 6
