"""An attention kernel's form is found again by its key, so equal keys must mean equal compiled kernels."""

import inspect
import itertools

import pytest
import torch
from oracles_attention import Step

from shardwise.ops.attention import triton
from shardwise.ops.attention.triton import triton_attention_flattened_mha_with_cache
from shardwise.ops.kernel_launch import Form
from shardwise.plan_cache import PlanCache

pytest.importorskip("triton")


def compiled_for(form, pointers, free):
    """What Triton compiles a launch for: constexprs, pointer dtypes and their alignment, options."""
    names = inspect.signature(form._kernel.fn).parameters
    constants, kinds = [], []
    for (name, parameter), value in zip(names.items(), (*pointers, *free, *form._fixed), strict=True):
        if parameter.annotation is not inspect.Parameter.empty:
            constants.append((name, value))
        elif isinstance(value, torch.Tensor):
            kinds.append((name, value.dtype, value.data_ptr() % 16 == 0))
    return tuple(constants), tuple(kinds), tuple(form._options.items())


@pytest.fixture(autouse=True)
def forms_of_this_test(monkeypatch):
    monkeypatch.setattr(triton, "_FORMS", {})
    monkeypatch.setattr(triton, "_PLANS", PlanCache())


def call(step, *, dtype=torch.float16, cache_dtype=None, heads=4, size=16, max_seq=64, window=None, sinks=None, skew=0,
         index_dtype=torch.int32):  # fmt: skip
    """One call on tensors that start `skew` elements behind an aligned address."""

    def tensor(*shape, dtype=dtype):
        return torch.zeros(skew + torch.Size(shape).numel(), dtype=dtype)[skew:].view(shape)

    q, k, v = (tensor(1, step.tokens, n, size) for n in (heads, 2, 2))
    caches = [tensor(8, max_seq, 2, size, dtype=cache_dtype or dtype) for _ in range(2)]
    info, seq_len, input_pos, slots, cu_seqlen = step.metadata()
    triton_attention_flattened_mha_with_cache(
        q,
        k,
        v,
        info,
        seq_len.to(index_dtype),
        input_pos.to(index_dtype),
        slots,
        cu_seqlen,
        *caches,
        None,
        sinks,
        window,
    )


STEPS = [
    Step([1] * 3, [5, 6, 7], [0, 1, 2], decode=3),
    Step([1], [5], [0], decode=1),
    Step([3, 2], [0, 4], [0, 1]),
    Step([3] * 20, [0] * 20, [0] * 20),
    Step([9, 1], [0, 4], [0, 1], decode=1),
]
CHANGES = [
    {}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"cache_dtype": torch.float8_e4m3fn}, {"heads": 8},
    {"size": 32}, {"size": 20}, {"max_seq": 128}, {"window": 4}, {"window": 5}, {"sinks": torch.zeros(4)},
    {"sinks": torch.zeros(4).half()}, {"sinks": torch.zeros(5)[1:]}, {"skew": 1}, {"index_dtype": torch.int64},
]  # fmt: skip


def test_equal_keys_mean_equal_compiled_kernels(monkeypatch):
    launches = {}

    def record(self, grid, pointers, free):
        key = self, tuple(pointer.data_ptr() % 16 == 0 for pointer in pointers)
        found = launches.setdefault(key, compiled_for(self, pointers, free))
        assert found == compiled_for(self, pointers, free)

    monkeypatch.setattr(Form, "__call__", record)
    for step, change in itertools.product(STEPS, CHANGES):
        call(step, **change)
    # Batch sizes and lengths do not multiply the kernels: fewer than the calls times their launches.
    assert len(CHANGES) < len(launches) < 2.5 * len(STEPS) * len(CHANGES)


def test_a_batch_of_another_size_takes_the_same_kernels(monkeypatch):
    forms = set()
    monkeypatch.setattr(Form, "__call__", lambda self, grid, pointers, free: forms.add(self))
    monkeypatch.setattr(triton.tiles, "choose_splits", lambda *_: 2)
    for count in (2, 3, 7):
        call(Step([1] * count, [5] * count, [0] * count, decode=count))
    assert len(forms) == 2
