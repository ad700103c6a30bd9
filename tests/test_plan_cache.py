"""Plans cached by the layout of tensors, and the quick ways to views and new tensors."""

import gc
import weakref

import pytest
import torch

from shardwise import plan_cache
from shardwise.plan_cache import PlanCache, allocator, taken_as_given, view

CPU = torch.device("cpu")


def test_a_plan_is_found_for_other_tensors_of_the_same_layout():
    plans = PlanCache()
    plans.keep("step", (torch.zeros(2, 3), torch.zeros(4)), "plan")
    assert plans.get("step", (torch.ones(2, 3), torch.ones(5)[1:])) == "plan"
    assert plans.get("another step", (torch.ones(2, 3), torch.ones(4))) is None


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 2),
        torch.zeros(3, 2).t(),
        torch.zeros(2, 3, 1),
        torch.zeros(2, 3).half(),
        torch.zeros(2, 6)[:, ::2],
        torch.zeros(2, 4)[:, :3],
        torch.zeros(2, 3, device="meta"),
        None,
    ],
    ids=["shape", "strides", "dimensions", "dtype", "column stride", "row stride", "device", "no tensor"],
)
def test_another_layout_is_not_found(other):
    plans = PlanCache()
    plans.keep("step", (torch.zeros(2, 3), torch.zeros(4)), "plan")
    assert plans.get("step", (other, torch.zeros(4))) is None
    if other is not None:
        plans.keep("step", (other, torch.zeros(4)), "other plan")
        assert plans.get("step", (other, torch.zeros(4))) == "other plan"
    assert plans.get("step", (torch.zeros(2, 3), torch.zeros(4))) == "plan"


def test_inference_and_gradients_have_plans_of_their_own():
    plans = PlanCache()
    plans.keep("step", (torch.zeros(3),), "plain")
    with torch.inference_mode():
        assert plans.get("step", (torch.zeros(3),)) is None
        plans.keep("step", (torch.zeros(3),), "inference")
        assert plans.get("step", (torch.zeros(3),)) == "inference"
    assert plans.get("step", (torch.zeros(3),)) == "plain"


def test_a_tensor_given_twice_is_not_kept():
    plans, x = PlanCache(), torch.zeros(3)
    assert plans.keep("step", (x, x), "plan") == "plan"
    assert plans.get("step", (x, x)) is None and not plans._plans


def test_neither_tensors_nor_their_memory_are_kept():
    plans, x = PlanCache(), torch.zeros(3)
    plans.keep("step", (x,), "plan")
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_a_full_cache_starts_over(monkeypatch):
    monkeypatch.setattr(plan_cache, "CAPACITY", 3)
    plans = PlanCache()
    for length in range(1, 6):
        plans.keep("step", (torch.zeros(length),), length)
    assert [plans.get("step", (torch.zeros(length),)) for length in range(1, 6)] == [None, None, None, 4, 5]


def test_copies_are_told_apart_from_what_was_given():
    x, y = torch.zeros(3), torch.zeros(3)
    assert taken_as_given((x, y), (x, y)) and not taken_as_given((x, y.clone()), (x, y))


@pytest.mark.parametrize("sizes", [(), (5,), (2, 3, 4), (2, 0, 4)])
def test_fresh_tensors_are_new_and_contiguous(sizes):
    make = allocator(sizes, torch.float16, CPU)
    one, another = make(), make()
    assert one.shape == sizes and one.dtype == torch.float16 and one.is_contiguous()
    assert not one.numel() or one.data_ptr() != another.data_ptr()


def test_fresh_tensors_take_strides_and_are_filled_where_results_must_repeat():
    make = allocator((4, 3), torch.float32, CPU, strides=(1, 0))
    assert make().stride() == (1, 0) and make().untyped_storage().nbytes() == 16
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert make().isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_views_begin_where_they_are_told_to():
    x = torch.arange(24.0)[4:].view(4, 5)
    part = view(x, (3, 2), (5, 1), 6)
    assert torch.equal(part, x[1:, 1:3]) and part.data_ptr() == x[1:, 1:3].data_ptr()
    assert torch.equal(view(x, (20,), (1,)), x.flatten())
