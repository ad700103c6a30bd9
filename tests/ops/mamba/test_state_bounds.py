"""State operators on bad metadata: it raises, if only in the next call; until then wrong values for prefill sequences,
no access outside, decode as ever."""

import contextlib
import functools

import pytest
import samples_fla
import samples_mamba
import torch
from guarded import Guarded, guard_all
from mamba_oracle import Batch
from operator_samples import flat, mutated
from test_operator_table import INFOS

from shardwise.ops import metadata_reports
from shardwise.ops.attention.batch import Batch as CountedBatch
from shardwise.ops.fla.step import plan_prefill
from shardwise.ops.mamba import metadata
from shardwise.ops.registry import TRITON
from shardwise.ops.triton_support import interpreting

OPS = torch.ops.auto_deploy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning"),
    pytest.mark.skipif(not TRITON.state[0], reason="needs triton"),
]
BATCH = Batch(prefill=(40, 0, 33, 2), decode=3, slots=(4, 6, 0, 2, 5, -1, 1), resumes=(True, False, False, True))
TOKENS, SEQUENCES, CHUNK = 75, 4, 16
ALONE = [1, 3, 5]  # slots that no prefill sequence names
METADATA = "mamba_ssm_prepare_metadata"
LEAST, MOST = -(2**31), 2**31 - 1
BOUNDS = {
    "descending": [75, 73, 40, 40, 0],
    "up and down": [0, 75, 0, 75, 0],
    "one entry back": [0, 40, 7, 73, 75],
    "negative": [-3, 40, 40, 73, 75],
    "beyond the prefill tokens": [0, 40, 40, 73, 78],
    "far beyond": [0, 40, 40, 73, 10**9],
    "all beyond": [100] * 5,
    "extremes": [LEAST, MOST, LEAST, MOST, LEAST],
    "extremes, then back": [MOST, LEAST, 0, MOST, 1],
    "too few": [0, 0, 0, 0, 3],
}
BUILDERS = {
    "triton_cached_ssm": samples_mamba.cached_ssm_args("triton_cached_ssm", BATCH, chunk=CHUNK),
    "flashinfer_cached_ssm": samples_mamba.cached_ssm_args(
        "flashinfer_cached_ssm", BATCH, 8, 2, 64, 128, CHUNK, torch.bfloat16, torch.float32
    ),
    "triton_cached_causal_conv1d": samples_mamba.cached_conv_args("triton_cached_causal_conv1d", BATCH),
    "cuda_cached_causal_conv1d": samples_mamba.cached_conv_args("cuda_cached_causal_conv1d", BATCH),
    # The forms of the operator table, which fla compiles and tunes for minutes.
    "fla_cached_delta_rule": samples_fla.cached_args(False, BATCH, K=64, V=64, dtype=torch.bfloat16),
    "fla_cached_gated_delta_rule": samples_fla.cached_args(True, BATCH, K=64, V=64, v_heads=4, dtype=torch.bfloat16),
}
HERE = [
    pytest.param(op, marks=[] if DEVICE == "cpu" else [pytest.mark.gpu])
    for op in BUILDERS
    if INFOS[f"auto_deploy::{op}"].availability()[0] or (op.startswith("triton_") and interpreting())
]
SSM = [param for param in HERE if param.values[0].endswith("_ssm")]


def checked(monkeypatch):
    """The interpreter looks at every address; on a device the guards around the arguments have to do."""
    if not interpreting():
        return contextlib.nullcontext()
    from memory_check import checked_memory

    return checked_memory(monkeypatch)


@pytest.fixture
def kernels_decide(monkeypatch):
    """Bad metadata reaches the kernels on the CPU as well."""
    monkeypatch.setattr(metadata_reports, "AT_ONCE", set())


def reported():
    """What the kernels of earlier calls complain of."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError) as caught:
        metadata_reports.raise_reports()
    metadata_reports.raise_reports()
    return str(caught.value)


def run(op, args):
    """(tokens, states) after a call on guarded copies of `args`."""
    made: list[Guarded] = []
    args, overload = guard_all(tuple(args), 0xFF, made), getattr(OPS, op).default
    tokens, states = flat(overload(*args)) + mutated(overload, args)
    assert all(one.untouched() for one in made)
    return tokens.clone(), states.clone()


def arguments(op):
    torch.manual_seed(0)
    return BUILDERS[op](DEVICE)


@functools.cache
def expected_of(op):
    return run(op, arguments(op))


def check(monkeypatch, op, args, change):
    """A call with the arguments of `change` (by their place) stays in its tensors and leaves decode as it was."""
    expected = expected_of(op)
    bad = [change.get(i, a) for i, a in enumerate(args)]
    with checked(monkeypatch):
        tokens, states = run(op, bad)
    assert torch.equal(tokens.flatten(0, 1)[TOKENS:], expected[0].flatten(0, 1)[TOKENS:])
    assert torch.equal(states[ALONE], expected[1][ALONE])


def replaced(bounds, values, dtype=None):
    """`bounds` with `values` first, in a tensor without an entry too many."""
    return torch.tensor(values, dtype=dtype or bounds.dtype, device=bounds.device)


def place_of_bounds(args):
    entries = len(BATCH.lengths) + 1  # as many as heads of one sample and as pieces, which follow, on a device
    shaped = (i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.shape == (entries,))
    return next(i for i in shaped if not args[i].is_floating_point())


WIDE = ("one entry back", "far beyond", "extremes")
CASES = [(kind, torch.int32) for kind in BOUNDS] + [(kind, torch.int64) for kind in WIDE]


@pytest.mark.usefixtures("kernels_decide")
@pytest.mark.parametrize("kind,dtype", CASES, ids=str)
@pytest.mark.parametrize("op", HERE)
def test_bad_bounds_are_reported_and_lead_nowhere_outside(monkeypatch, op, kind, dtype):
    args = arguments(op)
    place = place_of_bounds(args)
    values = [v << 31 if dtype == torch.int64 and v in (LEAST, MOST) else v for v in BOUNDS[kind]]
    bounds, change = replaced(args[place], values, dtype), {}
    if op.endswith("_ssm"):  # with the pieces of the good bounds, then with those of the bad ones
        check(monkeypatch, op, args, {place: bounds})
        assert reported().startswith(f"{op}: in an earlier call cu_seqlen holds")
        pieces = metadata._on_device(METADATA, CountedBatch(SEQUENCES, TOKENS, 3), bounds, CHUNK)
        change = dict(zip((11, 12, 13), pieces, strict=True))
        assert reported().startswith(f"{METADATA}: in an earlier call cu_seqlen holds")
    check(monkeypatch, op, args, {place: bounds, **change})
    assert reported().startswith(f"{op}: in an earlier call cu_seqlen holds")


@pytest.mark.usefixtures("kernels_decide")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("sequence", [0, SEQUENCES + 1])
@pytest.mark.parametrize("slot", [7, -2, MOST, LEAST])
@pytest.mark.parametrize("op", HERE)
def test_a_slot_outside_of_the_cache_is_reported_and_skipped(monkeypatch, op, slot, sequence, dtype):
    args = arguments(op)
    place = place_of_bounds(args) + 1
    slots = args[place].to(dtype)
    slots[sequence] = slot
    expected = run(op, [args[place].index_fill(0, torch.tensor(sequence, device=DEVICE), -1) if i == place else a
                        for i, a in enumerate(args)])  # fmt: skip
    with checked(monkeypatch):
        result = run(op, [slots if i == place else a for i, a in enumerate(args)])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert reported().startswith(f"{op}: in an earlier call slot_idx holds {slot} for sequence {sequence};")


@pytest.mark.parametrize("op", HERE)
def test_the_next_call_raises_what_a_kernel_reported(monkeypatch, op):
    args = arguments(op)
    place = place_of_bounds(args) + 1
    bad = [torch.full_like(a, 9) if i == place else a for i, a in enumerate(args)]
    with monkeypatch.context() as patch:
        patch.setattr(metadata_reports, "AT_ONCE", set())
        run(op, bad)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(ValueError, match=f"^{op}: in an earlier call slot_idx holds 9 for sequence"):
            run(op, args)
        run(op, args)
    monkeypatch.setattr(metadata_reports, "AT_ONCE", {False, True})
    with pytest.raises(ValueError, match=f"^{op}: slot_idx holds 9; the state cache has 7 slots"):
        run(op, bad)
    run(op, args)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are a GPU's")
@pytest.mark.parametrize("op", HERE)
def test_a_replayed_graph_reports_a_slot_outside_of_the_cache(op):
    args = arguments(op)
    place = place_of_bounds(args) + 1
    args = [a.clone() if i == place else a for i, a in enumerate(args)]
    overload = getattr(OPS, op).default
    overload(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        overload(*args)
    graph.replay()
    torch.cuda.synchronize()
    metadata_reports.raise_reports()
    args[place][SEQUENCES] = 7
    graph.replay()
    assert reported().startswith(f"{op}: in an earlier call slot_idx holds 7 for sequence {SEQUENCES};")


PIECES = {
    "chunks beyond the tokens": (11, [0, 1, 5, 10**6, MOST, 2, 2]),
    "chunks whose first token wraps around": (11, [1 << 28, 1 << 29, LEAST, -(1 << 28) + 1, 3, (1 << 28) + 4, -1]),
    "offsets outside of their chunk": (12, [-16, 17, 400, -1, MOST, LEAST, 0]),
    "negative offsets everywhere": (12, [-100] * 7),
    "sequences that do not exist": (13, [4, -2, MOST, LEAST, 100] * 15),
    "fewer pieces than the bounds have": (11, [0, 2]),
    "no piece": (11, []),
}


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("op", SSM)
def test_bad_pieces_lead_nowhere_outside(monkeypatch, op, kind):
    args = arguments(op)
    place, values = PIECES[kind]
    values = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    values = values.view(1, -1) if place == 13 else values
    change = {place: values}
    if place == 12 and args[11].numel() > 7:
        change[11] = args[11][:7]
    check(monkeypatch, op, args, change)


@pytest.mark.parametrize("change,words", [
    ({12: 2}, "chunk_offsets has 2 entries"),
    ({13: 30}, "seq_idx_prefill has 30 entries"),
    ({8: 4}, "cu_seqlen has 4 entries"),
])  # fmt: skip
@pytest.mark.parametrize("op", SSM)
def test_metadata_that_is_too_short_is_refused(op, change, words):
    args = arguments(op)
    bad = [a if i not in change else a.flatten()[: change[i]] for i, a in enumerate(args)]
    with pytest.raises(ValueError, match=f"{op}: {words}"):
        getattr(OPS, op)(*bad)


@pytest.mark.parametrize("kind", BOUNDS)
def test_pieces_of_bad_bounds_begin_inside_the_tokens(monkeypatch, kind):
    made: list[Guarded] = []
    bounds = guard_all(torch.tensor(BOUNDS[kind], dtype=torch.int32, device=DEVICE), 0xFF, made)
    with checked(monkeypatch):
        index, offset, owner = metadata._on_device(METADATA, CountedBatch(SEQUENCES, TOKENS, 0), bounds, CHUNK)
    assert reported().startswith(f"{METADATA}: in an earlier call cu_seqlen holds")
    first = (index * CHUNK + offset)[index >= 0]
    assert ((first >= 0) & (first < TOKENS)).all() and (index >= -1).all() and (offset < CHUNK).all()
    assert ((owner >= 0) & (owner <= SEQUENCES)).all()


@pytest.mark.parametrize("kind", [*BOUNDS, "good"])
def test_fla_gets_bounds_that_ascend_within_the_prefill_tokens(monkeypatch, kind):
    values = BOUNDS.get(kind, [0, 40, 40, 73, 75])
    bounds = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    cache, slots = torch.zeros(7, 2, 16, 16, device=DEVICE), torch.arange(SEQUENCES, device=DEVICE)
    out, batch = torch.zeros(1, 78, 2, 16, device=DEVICE), CountedBatch(SEQUENCES, TOKENS, 3)
    one = plan_prefill("fla_cached_delta_rule", batch, out, bounds, slots, slots > 0, cache)
    with checked(monkeypatch):
        states, safe, chunks, offsets = one.before(None, bounds, slots, slots > 0, cache)
        one.after(None, bounds, slots, cache, states, out)
    if kind != "good":
        assert reported().startswith("fla_cached_delta_rule: in an earlier call cu_seqlen holds")
    metadata_reports.raise_reports()
    cuts = safe.tolist()
    assert cuts == sorted(cuts) and cuts[0] >= 0 and cuts[-1] <= TOKENS
    assert cuts == values or kind != "good"
    lengths = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
    expected = [[i, c] for i, length in enumerate(lengths) for c in range(-(-length // 64))]
    assert chunks[: len(expected)].tolist() == expected
    assert offsets.diff().tolist() == [-(-length // 64) for length in lengths] and not offsets[0]
    assert all(0 <= i < SEQUENCES and lengths[i] <= 64 * c for i, c in chunks[len(expected) :].tolist())
