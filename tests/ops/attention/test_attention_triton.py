"""The Triton attention operator against the float64 oracle: in the interpreter here, compiled where there is a GPU."""

import contextlib

import oracles_attention as oracle
import pytest
import torch
from oracles_attention import Step

from shardwise.ops import metadata_reports, triton_support
from shardwise.ops.attention import tiles, triton
from shardwise.ops.attention.tiles import Tile, choose_splits
from shardwise.ops.attention.triton import OP
from shardwise.ops.kernel_launch import Launcher
from shardwise.ops.registry import operators
from shardwise.ops.triton_support import tl
from shardwise.plan_cache import PlanCache

INFO = next(info for info in operators() if info.name == OP)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not INFO.availability()[0], reason=INFO.availability()[1]),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),  # Triton's interpreter
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# tl.dot of bfloat16 gives garbage in the interpreter.
DTYPES = list(TOLERANCE) if DEVICE == "cuda" else [torch.float32, torch.float16]

STEPS = {
    "prefill": Step([21, 3], [0, 0], [2, 0]),
    "chunked prefill": Step([4, 18], [20, 1], [1, 3]),
    "decode": Step([1, 1, 1], [38, 0, 15], [0, 3, 1], decode=3),
    "mixed": Step([17, 5, 1, 1], [2, 0, 36, 0], [0, 3, 1, 2], decode=2),
    "zero length": Step([0, 4, 0], [0, 1, 2], [3, 1, 0]),
    "padding": Step([3, 2, 1, 1], [1, 0, 20, 0], [1, -1, 0, -1], decode=2, padding=3),
    "only padding": Step([], [], [], padding=2),
    "empty": Step([], [], []),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that these small shapes take several of them, in the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton, "_PLANS", PlanCache())
        monkeypatch.setattr(triton, "_FORMS", {})
        monkeypatch.setattr(tiles, "decode_tile", lambda group, *_: Tile(tiles.power_of_two(group), 16, 1, 1))
        monkeypatch.setattr(tiles, "prefill_tile", lambda *_: Tile(16, 16, 1, 1))


def build(step, heads=4, kv_heads=2, size=16, value_size=16, dtype=torch.float32, cache_dtype=None, max_seq=40):
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    q, k = random(step.tokens, heads, size), random(step.tokens, kv_heads, size)
    v = random(step.tokens, kv_heads, value_size)
    caches = random(4, max_seq, kv_heads, size), random(4, max_seq, kv_heads, value_size)
    return q, k, v, *(cache.to(cache_dtype or dtype) for cache in caches)


def run(step, q, k, v, k_cache, v_cache, scale=None, sinks=None, window=None, cap=None):
    new, metadata, options = (q[None], k[None], v[None]), step.metadata(DEVICE), (scale, sinks, window)
    if cap is not None:
        return triton.attend_to_cache(*new, *metadata[:-1], k_cache, v_cache, *options, cap)[0]
    operator = torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache
    return operator(*new, *metadata, k_cache, v_cache, *options)[0]


def check(step, tensors, **options):
    dtype = tensors[0].dtype
    want, k_want, v_want = oracle.cached_attention(step, *(x.cpu() for x in tensors), **options)
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(DEVICE)
    out = run(step, *tensors, **options)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for cache, cache_want in zip(tensors[3:], (k_want, v_want), strict=True):
        assert torch.equal(cache.float().cpu(), cache_want.float())


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_equal_oracle(name, dtype):
    check(STEPS[name], build(STEPS[name], dtype=dtype))


@pytest.mark.parametrize("seed", range(12))
def test_random_steps_equal_oracle(seed):
    step = oracle.random_step(seed, max_seq=40)
    options = [{}, {"window": 19}, {"sinks": torch.linspace(-1, 3, 4)}, {"window": 5}][seed % 4]
    check(step, build(step), **options)


@pytest.mark.parametrize("heads", [
    {"heads": 3, "kv_heads": 1}, {"heads": 2, "kv_heads": 2}, {"size": 20, "value_size": 9},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "options", [{}, {"window": 7}, {"sinks": True}, {"sinks": True, "window": 18, "scale": 0.7}], ids=str
)
def test_heads_and_options(heads, options):
    tensors = build(STEPS["mixed"], **heads)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 3, tensors[0].shape[1]).reshape(-1, 1)
    check(STEPS["mixed"], tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"window": 7}, {"sinks": torch.linspace(-1, 3, 4)}, {"scale": -40.0}, {"cap": 70.0}], ids=str
)
def test_capped_scores(dtype, options):
    options = {"cap": 2.0, "scale": 3.0} | options
    check(STEPS["mixed"], build(STEPS["mixed"], dtype=dtype), **options)


@pytest.mark.parametrize("seed", range(6))
def test_capped_random_steps(seed):
    step = oracle.random_step(seed, max_seq=40)
    check(step, build(step), cap=50.0, scale=20.0, window=[None, 19][seed % 2])


def test_scores_at_their_cap_neither_overflow_nor_vanish():
    q, k, v, k_cache, v_cache = build(STEPS["prefill"])
    for sign in (1, -1):
        check(STEPS["prefill"], (q.abs(), sign * k.abs(), v, k_cache, v_cache), cap=60.0, scale=1e4)


def test_a_cap_of_zero_is_none():
    tensors = build(STEPS["mixed"])
    assert torch.equal(run(STEPS["mixed"], *tensors, cap=0.0), run(STEPS["mixed"], *tensors))


@pytest.mark.parametrize("scale", [0.0, -0.4])
@pytest.mark.parametrize("name", ["prefill", "decode", "mixed"])
def test_a_scale_may_be_zero_or_negative(name, scale):
    check(STEPS[name], build(STEPS[name]), scale=scale, window=19)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_any_number_of_splits(monkeypatch, splits):
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: splits)
    sinks = torch.linspace(-1, 3, 4)
    for options in ({}, {"sinks": sinks}, {"window": 17, "sinks": sinks}):
        check(STEPS["decode"], build(STEPS["decode"]), **options)


def test_fp8_cache():
    tensors = build(STEPS["mixed"], dtype=torch.float16, cache_dtype=torch.float8_e4m3fn)
    if DEVICE == "cpu":  # the interpreter rounds to fp8 otherwise than torch does
        tensors = tuple(x.clamp(-1, 1).round() if x.dtype == torch.float16 else x for x in tensors)
    check(STEPS["mixed"], tensors)


def reported():
    """What the kernels of earlier calls complain of."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError) as caught:
        metadata_reports.raise_reports()
    return str(caught.value)


def test_a_sequence_that_leaves_the_cache_is_neither_read_nor_stored(monkeypatch):
    monkeypatch.setattr(metadata_reports, "AT_ONCE", set())
    step = Step([4, 3, 1, 1], [38, 0, 40, 2], [0, 4, 1, 9], decode=2)
    tensors = build(step)
    before = [x.clone() for x in tensors[3:]]
    out = run(step, *tensors)
    assert not out.any()
    assert reported().startswith(f"{triton.OP}: in an earlier call ")
    # The prefill that starts inside the cache stores what fits.
    for cache, old in zip(tensors[3:], before, strict=True):
        assert torch.equal(cache[1:], old[1:]) and torch.equal(cache[0, :38], old[0, :38])


@pytest.mark.parametrize("values,at_once,words", [
    ({"slot_idx": 4}, "slot_idx holds 4; legal", "slot_idx holds 4 for sequence {}; legal"),
    ({"slot_idx": -2}, "slot_idx holds -2; legal", "slot_idx holds -2 for sequence {}; legal"),
    ({"input_pos": 40}, "input_pos 40 .* leaves the cache", "input_pos 40 and seq_len of sequence {} leave the cache"),
    ({"input_pos": -1}, "input_pos -1 .* leaves the cache", "input_pos -1 and seq_len of sequence {} leave the cache"),
    ({"seq_len": 1}, "counts 5 prefill tokens", "seq_len of the prefill sequences adds up to 2"),
])  # fmt: skip
@pytest.mark.parametrize("sequence", [0, 2])  # of prefill, of decode
def test_bad_metadata_raises_at_once_or_in_the_next_call(monkeypatch, values, at_once, words, sequence):
    step = Step([4, 1, 1], [2, 3, 5], [0, 1, 2], decode=1)
    tensors = build(step)
    info, seq_len, input_pos, slot_idx, cu_seqlen = step.metadata(DEVICE)
    bad = {"seq_len": seq_len.clone(), "input_pos": input_pos.clone(), "slot_idx": slot_idx.clone()}
    if "seq_len" in values and sequence:
        pytest.skip("decode sequences have one token")
    for name, value in values.items():
        bad[name][sequence] = value
    new, caches = [x[None] for x in tensors[:3]], tensors[3:]
    operator = torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache
    monkeypatch.setattr(metadata_reports, "AT_ONCE", {False, True})
    with pytest.raises(ValueError, match=f"^{triton.OP}: .*{at_once}"):
        operator(*new, info, *bad.values(), cu_seqlen, *caches, None)
    monkeypatch.setattr(metadata_reports, "AT_ONCE", set())
    operator(*new, info, *bad.values(), cu_seqlen, *caches, None)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=f"^{triton.OP}: in an earlier call {words.format(sequence)}"):
        operator(*new, info, seq_len, input_pos, slot_idx, cu_seqlen, *caches, None)
    operator(*new, info, seq_len, input_pos, slot_idx, cu_seqlen, *caches, None)


@triton_support.triton.jit
def _copy_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out_ptr + index, tl.load(x_ptr + index))


in_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="the memory checker sits in the interpreter")


@in_interpreter
def test_the_memory_checker_notices_one_element_too_many(monkeypatch):
    from memory_check import checked_memory
    from triton.runtime.errors import InterpreterError

    launch, memory = Launcher(_copy_kernel), torch.zeros(2, 64)
    for x, out in ((memory[0, :15], memory[1, :16]), (memory[0, :16], memory[1, :15])):
        with checked_memory(monkeypatch), pytest.raises(InterpreterError, match="OutOfBounds.*1 of 16"):
            launch(memory.device, None, (1, 1, 1), (x, out, 16))
    with checked_memory(monkeypatch):
        launch(memory.device, None, (1, 1, 1), (memory[0, :16], memory[1, :16], 16))


@in_interpreter
@pytest.mark.parametrize("seed", range(20))
def test_no_metadata_makes_a_kernel_leave_its_tensors(monkeypatch, seed):
    from memory_check import checked_memory

    monkeypatch.setattr(metadata_reports, "AT_ONCE", set())
    step = oracle.random_step(seed, max_seq=40) if seed % 2 else STEPS[list(STEPS)[seed // 2 % 6]]
    q, k, v, k_cache, v_cache = build(step, size=20, value_size=9)
    info, *metadata, cu_seqlen = step.metadata()
    if seed >= 8:  # garbage
        generator = torch.Generator().manual_seed(seed)
        wild = torch.tensor([-(2**31), -41, -1, 0, 1, 3, 39, 40, 41, 2**31 - 1])
        for values in metadata:
            values.copy_(wild[torch.randint(len(wild), values.shape, generator=generator)])
    with checked_memory(monkeypatch) as seen:
        torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache(
            q[None], k[None], v[None], info, *metadata, cu_seqlen, k_cache, v_cache, None, None, 7 if seed % 3 else None
        )
    assert sum(seen) > 0
    with contextlib.suppress(ValueError):
        metadata_reports.raise_reports()


def test_strided_flattened_and_generate_shapes():
    step = STEPS["decode"]
    q, k, v, k_cache, v_cache = build(step)
    want = run(step, q, k, v, k_cache.clone(), v_cache.clone())
    fused = torch.cat([x.reshape(3, 1, -1) for x in (q, k, v)], dim=-1)
    parts = fused.split([64, 32, 32], dim=-1)
    info, _, input_pos, slots, _ = step.metadata(DEVICE)
    wide = [torch.stack((x, x), dim=2)[:, :, 0] for x in (k_cache, v_cache)]
    operator = torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache
    out = operator(*parts, info, None, input_pos.long(), slots.int(), None, *wide, None)
    assert out.shape == (3, 1, 64)
    torch.testing.assert_close(out.view(3, 4, 16), want)


def test_bad_arguments():
    step = STEPS["mixed"]
    q, k, v, k_cache, v_cache = build(step)
    with pytest.raises(ValueError, match="q holds 20"):
        run(step, q[:20], k[:20], v[:20], k_cache, v_cache)
    with pytest.raises(ValueError, match="3 query heads over 2 KV heads"):
        run(step, q[:, :3], k, v, k_cache, v_cache)
    with pytest.raises(ValueError, match="sinks has 3 elements"):
        run(step, q, k, v, k_cache, v_cache, sinks=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="stride 2 in its last dimension; legal: 1"):
        run(step, q, k, v, torch.stack((k_cache, k_cache), dim=-1)[..., 0], v_cache)
    with pytest.raises(TypeError, match="legal: float16, bfloat16, float32"):
        run(step, *(x.double() for x in (q, k, v)), k_cache, v_cache)
    with pytest.raises(ValueError, match="slot_idx is 3 entries"):
        info, seq_len, input_pos, slots, cu_seqlen = step.metadata(DEVICE)
        torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache(
            q[None], k[None], v[None], info, seq_len, input_pos, slots[:3], cu_seqlen, k_cache, v_cache, None
        )


def test_passes_opcheck():
    step = STEPS["mixed"]
    q, k, v, k_cache, v_cache = build(step)
    operator = torch.ops.auto_deploy.triton_attention_flattened_mha_with_cache
    arguments = (q[None], k[None], v[None], *step.metadata(DEVICE), k_cache, v_cache, None)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# The quickest on an H200 of 1 to 3 splits, or within 1 % of it.
MEASURED = {
    (64, 1024): 2,
    (96, 4096): 2,
    (192, 4096): 1,
    (512, 1024): 2,
    (512, 8192): 2,
    (896, 2048): 2,
    (2048, 1024): 1,
}


@pytest.mark.parametrize(("programs", "max_seq"), MEASURED)
def test_splits_are_those_that_a_device_was_quickest_with(programs, max_seq):
    assert choose_splits(programs, processors=132, max_seq=max_seq, keys=64) == MEASURED[programs, max_seq]


@pytest.mark.parametrize("max_seq", [8192, 16384, 32768])
def test_one_long_sequence_fills_the_device(max_seq):
    assert 8 * choose_splits(8, processors=132, max_seq=max_seq, keys=64) > 0.95 * 132


def test_splits_are_no_more_than_blocks():
    assert choose_splits(8, processors=132, max_seq=300, keys=64) <= 5
    assert choose_splits(8, processors=132, max_seq=64, keys=64) == 1
