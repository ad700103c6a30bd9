"""Operators with a state per sequence: pieces equal the whole, bad metadata raises, other implementations agree."""

import math
from dataclasses import replace

import pytest
import samples_fla
import samples_mamba
import torch
from mamba_oracle import Batch
from operator_samples import flat, mutated

from shardwise.ops import metadata_reports
from shardwise.ops.attention.batch import Batch as CountedBatch
from shardwise.ops.mamba import conv_triton, metadata, scan
from shardwise.ops.mamba import triton as ssm_triton
from shardwise.ops.registry import FLA, TRITON
from shardwise.ops.triton_support import interpreting
from shardwise.plan_cache import PlanCache

OPS = torch.ops.auto_deploy
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not TRITON.state[0], reason="needs triton")
SSM_OPS = ["torch_cached_ssm", pytest.param("triton_cached_ssm", marks=needs_triton)]
CONV_OPS = ["torch_cached_causal_conv1d", pytest.param("triton_cached_causal_conv1d", marks=needs_triton)]


def run_ssm(op, inputs, batch, state, chunk):
    info, seq_len, bounds, slots, resumes = batch.tensors(inputs[0].device)
    rest = (bounds, slots, resumes)
    if op == "torch_cached_ssm":
        return OPS.torch_cached_ssm(*inputs, info, seq_len, *rest, state, samples_mamba.LIMIT, chunk)
    positions = torch.zeros(inputs[0].shape[:2], dtype=torch.int64, device=inputs[0].device)
    pieces = OPS.mamba_ssm_prepare_metadata(positions, info, seq_len, bounds, chunk)
    return getattr(OPS, op)(*inputs, info, *rest, *pieces, state, samples_mamba.LIMIT, chunk)


def cuts(total, seed):
    """A random partition of `total` tokens, with pieces of one token among them."""
    torch.manual_seed(seed)
    lengths = []
    while sum(lengths) < total:
        lengths.append(min(int(torch.randint(1, 9, ())) if torch.rand(()) > 0.3 else 1, total - sum(lengths)))
    return lengths


@pytest.mark.parametrize("op", SSM_OPS)
@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_fed_in_pieces_gives_the_whole_scan(op, seed):
    lengths = cuts(29, seed)
    inputs = samples_mamba.ssm_inputs(29, 4, 2, 16, 16, torch.float32, DEVICE)
    whole = OPS.torch_ssm(*inputs, samples_mamba.LIMIT, 8)
    state, parts, start = torch.randn(2, 4, 16, 16, device=DEVICE), [], 0
    for number, length in enumerate(lengths):
        part = [t[:, start : start + length].contiguous() if t.dim() > 2 else t for t in inputs]
        batch = Batch((), 1, (1,), ()) if length == 1 and number else Batch((length,), 0, (1,), (number > 0,))
        parts.append(run_ssm(op, part, batch, state, 8))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", CONV_OPS)
def test_a_prompt_fed_in_pieces_gives_the_whole_convolution(op):
    x, weight, bias = torch.randn(1, 29, 8), torch.randn(8, 1, 4), torch.randn(8)
    x, weight, bias = x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)
    whole = OPS.torch_causal_conv1d(x, weight, bias, 1, 3, 1, 8)
    in_place = op != "torch_cached_causal_conv1d"
    state, parts, start = torch.randn(1, 8, 3 if in_place else 4, device=DEVICE), [], 0
    for number, length in enumerate(cuts(29, 5)):
        part = x[:, start : start + length].clone()
        batch = Batch((), 1, (0,), ()) if length == 1 and number else Batch((length,), 0, (0,), (number > 0,))
        tail = (*batch.tensors(DEVICE), state, 1, 3, 1, 8, "zeros")
        result = getattr(OPS, op)(part, weight, bias, *tail, *((None,) if in_place else ()))
        parts.append(part if in_place else result)
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", CONV_OPS)
def test_a_decode_step_of_the_convolution_needs_no_metadata_of_prefill(op):
    batch = Batch((), 3, (2, -1, 0), ())
    args = list(samples_mamba.cached_conv_args(op, batch)(DEVICE))
    again = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    again[4] = again[5] = again[7] = None  # seq_len, cu_seqlen, use_initial_states
    results = [flat(getattr(OPS, op)(*each)) + mutated(getattr(OPS, op).default, each) for each in (args, again)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_triton
def test_a_block_is_no_shorter_than_the_inputs_that_it_needs():
    batch = Batch((40, 3), 1, (1, 0, 2), (True, True))
    args = samples_mamba.cached_conv_args("triton_cached_causal_conv1d", batch, 8, 20)(DEVICE)
    expected, states = samples_mamba.cached_conv(batch, True)(*args)
    OPS.triton_cached_causal_conv1d(*args)
    torch.testing.assert_close(args[0].double().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(args[8].double().cpu(), states)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_tokens_that_share_a_program_are_convolved_alone(monkeypatch, dtype):
    batch = Batch((), 5, (2, -1, 0, 6, 3), ())
    args = samples_mamba.cached_conv_args("triton_cached_causal_conv1d", batch, 40, 4, dtype)(DEVICE)
    again = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    OPS.triton_cached_causal_conv1d(*args)
    monkeypatch.setattr(conv_triton, "MANY_TOKENS", 1)
    monkeypatch.setattr(conv_triton, "PLANS", PlanCache())
    OPS.triton_cached_causal_conv1d(*again)
    torch.testing.assert_close(args[0], again[0])
    assert torch.equal(args[8], again[8])


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_fed_in_pieces_gives_the_whole_delta_rule(seed):
    q, k, v, g, beta = samples_fla.inputs(True, 1, 150, 2, 4, 16, 8, torch.float32, "cpu")
    whole = OPS.torch_gated_delta_rule(q, k, v, g, beta, 0.3)
    state, parts, start = torch.randn(1, 4, 16, 8), [], 0
    for number, length in enumerate(cuts(150, seed)):
        one = slice(start, start + length)
        batch = Batch((length,), 0, (0,), (number > 0,))
        info, _, bounds, slots, resumes = batch.tensors("cpu")
        part = [t[:, one] for t in (q, k, v, g, beta)]
        parts.append(OPS.torch_cached_gated_delta_rule(*part, info, bounds, slots, resumes, state, 0.3))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_chunk_size_does_not_change_the_scan(chunk):
    inputs = samples_mamba.ssm_inputs(21, 4, 1, 8, 4, torch.float64, "cpu")
    args = [t.double() for t in inputs]
    torch.testing.assert_close(
        OPS.torch_ssm(*args, [0.0, math.inf], chunk), OPS.torch_ssm(*args, [0.0, math.inf], 7), rtol=1e-4, atol=1e-4
    )


@needs_triton
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("lengths", [(5, 0, 11, 1), (4, 4, 8), (37,), (0, 3, 0, 0, 2), (1,) * 20])
def test_pieces_made_on_the_device_are_those_made_on_the_host(lengths, chunk):
    _, _, bounds, _, _ = Batch(lengths, 0, (0,) * len(lengths), (False,) * len(lengths)).tensors(DEVICE)
    batch = CountedBatch(len(lengths), sum(lengths), 0)
    index, offset, owner = metadata._on_device("test", batch, bounds, chunk)
    expected = metadata._on_host(bounds.tolist(), chunk, bounds.device)
    pieces = expected[0].numel()
    assert index.numel() >= pieces and (index[pieces:] == -1).all() and (offset[pieces:] == -1).all()
    assert torch.equal(index[:pieces], expected[0]) and torch.equal(offset[:pieces], expected[1])
    assert torch.equal(owner, expected[2])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_that_share_a_program_are_scanned_alone(monkeypatch, dtype):
    batch = Batch((37, 3, 20), 1, (3, -1, 0, 5), (True, True, False))
    args = samples_mamba.cached_ssm_args("triton_cached_ssm", batch, 4, 2, 16, 32, 32, dtype)(DEVICE)
    again = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    monkeypatch.setitem(scan.OUTPUTS, "heads", 1)
    alone = OPS.triton_cached_ssm(*args)
    monkeypatch.setitem(scan.OUTPUTS, "heads", 2)
    monkeypatch.setattr(ssm_triton, "BACKEND", replace(ssm_triton.BACKEND, plans=PlanCache()))
    torch.testing.assert_close(OPS.triton_cached_ssm(*again), alone)


@needs_triton
@pytest.mark.parametrize("cache_bytes", [0, 2**40], ids=["from memory", "from the cache"])
@pytest.mark.parametrize("slots", [(3, -1, 0, 5), (3, 6, 0, -2)])
def test_a_decode_token_without_a_slot_gives_zeros_and_changes_no_state(monkeypatch, slots, cache_bytes):
    monkeypatch.setattr(scan, "cache_bytes", lambda device: cache_bytes)
    monkeypatch.setattr(ssm_triton, "BACKEND", replace(ssm_triton.BACKEND, plans=PlanCache()))
    monkeypatch.setattr(metadata_reports, "AT_ONCE", set())
    inputs = samples_mamba.ssm_inputs(4, 4, 2, 16, 20, torch.float32, DEVICE)
    state = torch.randn(6, 4, 16, 20, device=DEVICE)
    kept = [slot if 0 <= slot < 6 else -1 for slot in slots]
    expected, got = state.clone(), state.clone()
    wanted = run_ssm("torch_cached_ssm", inputs, Batch((), 4, tuple(kept), ()), expected, 8)
    result = run_ssm("triton_cached_ssm", inputs, Batch((), 4, slots, ()), got, 8)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if kept != list(slots):
        with pytest.raises(ValueError, match="^triton_cached_ssm: in an earlier call slot_idx holds"):
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            metadata_reports.raise_reports()


def test_a_decode_step_is_cut_without_lengths_and_bounds():
    positions, info = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), torch.tensor([0, 0, 2], dtype=torch.int32)
    pieces = OPS.mamba_ssm_prepare_metadata(positions, info, None, None, 4)
    assert [tuple(one.shape) for one in pieces] == [(0,), (0,), (1, 0)]
    assert all(one.device.type == DEVICE and one.dtype == torch.int32 for one in pieces)


@needs_triton
def test_a_prompt_of_two_dtypes_is_refused_in_words():
    x, A, B, *rest = samples_mamba.ssm_inputs(4, 4, 2, 16, 16, torch.float32, DEVICE)
    state = torch.zeros(1, 4, 16, 16, device=DEVICE)
    with pytest.raises(TypeError, match="hidden_states, B and C are torch.float32, torch.float16 and torch.float32"):
        run_ssm("triton_cached_ssm", (x, A, B.half(), *rest), Batch((4,), 0, (0,), (False,)), state, 8)


IN_PLACE = [sample for sample in samples_mamba.SAMPLES if sample.op.startswith("triton_")]


@pytest.mark.skipif(not (TRITON.state[0] and interpreting()), reason="needs triton's interpreter")
@pytest.mark.parametrize("sample", IN_PLACE, ids=str)
def test_kernels_touch_only_their_tensors(monkeypatch, sample):
    from memory_check import checked_memory

    args = sample.build("cpu")
    with checked_memory(monkeypatch) as seen:
        sample.overload(*args)
    assert sum(seen) > 0


@needs_triton
@pytest.mark.parametrize("sample", IN_PLACE, ids=str)
def test_what_fresh_memory_holds_does_not_matter(sample):
    torch.manual_seed(0)
    args = sample.build(DEVICE)
    expected = sample.oracle(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is then filled with NaN
    try:
        got = flat(sample.overload(*args)) + mutated(sample.overload, args)
    finally:
        torch.use_deterministic_algorithms(False)
    for result, wanted in zip(got, expected, strict=True):
        worst = (result.double().cpu() - wanted.double().cpu()).abs() / wanted.double().cpu().abs().clamp(min=1)
        assert worst.max().item() <= sample.atol


@needs_triton
def test_unused_pieces_change_nothing():
    batch = Batch((5, 0, 11, 1), 0, (4, 6, 0, 2), (True, False, False, True))
    args = list(samples_mamba.cached_ssm_args("triton_cached_ssm", batch)(DEVICE))
    again = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    again[11], again[12] = (torch.nn.functional.pad(again[i], (0, 3), value=-1) for i in (11, 12))
    assert torch.equal(OPS.triton_cached_ssm(*args), OPS.triton_cached_ssm(*again))
    assert torch.equal(args[14], again[14])


BAD = {
    r"slot_idx is torch.float32 \[2\]; legal: an integer for each of the 2 sequences": {"slots": (1.0, 0.0)},
    r"cu_seqlen is torch.int32 \[1, 3\]": {"bounds": [[0, 3, 5]]},
    "slot_idx holds 9": {"slots": (9, 0)},
    "cu_seqlen begins": {"bounds": [0, 4, 3]},
    "counts 7 tokens": {"info": [2, 7, 0]},
    "legal: 3, or 6": {"info": [2, 5]},
}


@pytest.mark.parametrize("words,change", BAD.items())
@pytest.mark.parametrize("op", ["torch_cached_ssm", "torch_cached_causal_conv1d", "torch_cached_delta_rule"])
def test_bad_metadata_is_refused_in_words(op, words, change):
    batch = Batch((3, 2), 0, change.get("slots", (1, 0)), (True, False))
    info, seq_len, bounds, slots, resumes = batch.tensors("cpu")
    bounds = torch.tensor(change["bounds"], dtype=torch.int32) if "bounds" in change else bounds
    info = torch.tensor(change["info"], dtype=torch.int32) if "info" in change else info
    with pytest.raises(ValueError, match=words) as caught:
        if op == "torch_cached_ssm":
            inputs = samples_mamba.ssm_inputs(5, 4, 2, 8, 4, torch.float32, "cpu")
            state = torch.zeros(3, 4, 8, 4)
            OPS.torch_cached_ssm(*inputs, info, seq_len, bounds, slots, resumes, state, [0.0, 1.0], 4)
        elif op == "torch_cached_causal_conv1d":
            tail = (info, seq_len, bounds, slots, resumes, torch.zeros(3, 6, 4), 1, 3, 1, 6, "zeros")
            OPS.torch_cached_causal_conv1d(torch.zeros(1, 5, 6), torch.zeros(6, 1, 4), None, *tail)
        else:
            values = samples_fla.inputs(False, 1, 5, 2, 2, 4, 4, torch.float32, "cpu")
            OPS.torch_cached_delta_rule(*values, info, bounds, slots, resumes, torch.zeros(3, 2, 4, 4), 1.0)
    assert op in str(caught.value)


@pytest.mark.parametrize("op", CONV_OPS)
def test_a_state_cache_for_another_kernel_size_is_refused(op):
    batch = samples_mamba.PREFILL
    args = list(samples_mamba.cached_conv_args(op, batch, 8)(DEVICE))
    place = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 3 and i > 1)
    args[place] = torch.zeros(7, 8, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"conv_state_cache must be \[slots, C = 8, K.*got \(7, 8, 9\)"):
        getattr(OPS, op)(*args)


# Heads of each rank: seven over three ranks with the only group everywhere; eight with two groups over four ranks.
RANKS = {"uneven heads": (7, 1, [(0, 3, 0), (3, 5, 0), (5, 7, 0)]),
         "groups everywhere": (8, 2, [(0, 2, 0), (2, 4, 0), (4, 6, 1), (6, 8, 1)])}  # fmt: skip


@pytest.mark.parametrize("op", SSM_OPS)
@pytest.mark.parametrize("name", RANKS)
def test_ranks_compute_their_heads_of_the_whole(op, name):
    heads, groups, ranks = RANKS[name]
    batch = Batch((19, 6), 2, (3, 0, 2, 5), (True, False))
    x, A, B, C, D, dt, bias = samples_mamba.ssm_inputs(batch.tokens, heads, groups, 16, 16, torch.float32, DEVICE)
    state = torch.randn(6, heads, 16, 16, device=DEVICE)
    shards = [state[:, first:last].clone() for first, last, _ in ranks]
    whole = run_ssm(op, (x, A, B, C, D, dt, bias), batch, state, 8)
    for (first, last, group), shard in zip(ranks, shards, strict=True):
        mine, one = slice(first, last), slice(group, group + 1)
        inputs = (x[:, :, mine], A[mine], B[:, :, one], C[:, :, one], D[mine], dt[:, :, mine], bias[mine])
        part = run_ssm(op, inputs, batch, shard, 8)
        torch.testing.assert_close(part, whole[:, :, mine], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shard, state[:, mine], rtol=1e-4, atol=1e-4)


def test_groups_that_do_not_divide_the_heads_are_refused():
    inputs = samples_mamba.ssm_inputs(5, 4, 3, 8, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="groups 3 must divide the number of heads 4"):
        OPS.torch_ssm(*inputs, [0.0, 1.0], 4)


REAL = Batch((1000, 300, 0, 2048), 8, (5, 3, 0, 11, 1, 2, -1, 4, 6, 7, 8, 9), (True, False, True, False))


def relative(result, expected):
    result, expected = result.double(), expected.double()
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("op", ["triton_cached_ssm", "flashinfer_cached_ssm"])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [128, 256])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_scan_agrees_at_real_sizes(op, cache, chunk):
    torch.manual_seed(0)
    inputs = samples_mamba.ssm_inputs(REAL.tokens, 24, 8, 64, 128, torch.bfloat16, "cuda")
    state = torch.randn(12, 24, 64, 128, device="cuda").to(cache)
    reference = state.clone()
    expected = run_ssm("torch_cached_ssm", inputs, REAL, reference, chunk)
    result = run_ssm(op, inputs, REAL, state, chunk)
    assert relative(result, expected) < 1e-2
    assert relative(state, reference) < 1e-2


@pytest.mark.parametrize("op", ["triton_cached_causal_conv1d", "cuda_cached_causal_conv1d"])
@pytest.mark.parametrize("channels", [4096, 1001])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_convolution_agrees_at_real_sizes(op, channels):
    torch.manual_seed(0)
    args = list(samples_mamba.cached_conv_args(op, REAL, channels, 4, torch.bfloat16)("cuda"))
    position = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 3 and i > 1)
    args[position] = torch.randn(12, channels, 3, device="cuda", dtype=torch.bfloat16)
    expected = samples_mamba.cached_conv(REAL, True)(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])
    getattr(OPS, op)(*args)
    assert relative(args[0].cpu(), expected[0]) < 1e-2
    assert torch.equal(args[position].double().cpu(), expected[1])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.gpu
@pytest.mark.skipif(not FLA.state[0], reason="needs fla and a CUDA device")
def test_a_prompt_fed_to_fla_in_pieces_gives_the_whole_delta_rule(gated):
    name, heads = "gated_delta_rule" if gated else "delta_rule", 4
    values = samples_fla.inputs(gated, 1, 150, 2, heads, 64, 64, torch.bfloat16, DEVICE)
    whole = getattr(OPS, f"fla_{name}")(*values, 0.3)
    state, parts, start = torch.randn(3, heads, 64, 64, device=DEVICE), [], 0
    for number, length in enumerate(cuts(150, 0)):
        batch = Batch((), 1, (2,), ()) if length == 1 and number else Batch((length,), 0, (2,), (number > 0,))
        info, _, bounds, slots, resumes = batch.tensors(DEVICE)
        part = [t[:, start : start + length] for t in values]
        parts.append(getattr(OPS, f"fla_cached_{name}")(*part, info, bounds, slots, resumes, state, 0.3))
        start += length
    assert relative(torch.cat(parts, 1), whole) < 2e-2


@pytest.mark.parametrize("name", ["fla_cached_delta_rule", "fla_cached_gated_delta_rule"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_delta_rule_agrees_at_real_sizes(name):
    torch.manual_seed(0)
    gated = "gated" in name
    values = samples_fla.inputs(gated, 1, REAL.tokens, 8, 16, 128, 128, torch.bfloat16, "cuda")
    info, _, bounds, slots, resumes = REAL.tensors("cuda")
    state = torch.randn(12, 16, 128, 128, device="cuda")
    reference = state.clone()
    tail = (info, bounds, slots, resumes)
    expected = getattr(OPS, name.replace("fla", "torch", 1))(*values, *tail, reference, 0.1)
    assert relative(getattr(OPS, name)(*values, *tail, state, 0.1), expected) < 2e-2
    assert relative(state, reference) < 2e-2
