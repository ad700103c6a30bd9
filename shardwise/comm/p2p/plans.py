"""Calls worked out once for each layout of their tensors: what is recorded of them, their results, their launches.

A layout whose arguments were found right needs no look at them again. All that may change from call to call is asked
each time: whether the group is whole and no wait gave up, the stream, the deadline, check mode.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shardwise.comm import watch
from shardwise.comm.p2p.table import Tuning
from shardwise.plan_cache import PlanCache, allocator

if TYPE_CHECKING:
    from shardwise.comm.p2p.communicator import P2PCommunicator
    from shardwise.comm.p2p.launch import Pieces

_ALIGNMENT = 16
"""Bytes of the kernels' accesses: tensors that begin elsewhere have launches of their own."""


class _Plan(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """A new result."""
    pieces: "Pieces"
    details: tuple = ()
    """What else ranks must agree on."""


class Plans:
    """Of one group's calls by kernels of its own on contiguous tensors, where results are new, or a sum in its place.

    Keys hold the number of elements: layouts of one key are compared one after another.
    """

    def __init__(self, group: "P2PCommunicator"):
        self._group = group
        self._sums, self._norms, self._gathers = (PlanCache[_Plan]() for _ in range(3))

    def all_reduce(self, tensor: Tensor, strategy: str, in_place: bool) -> Tensor | None:
        """The sum, if there is a plan for it."""
        group, x = self._group, tensor.data_ptr()
        plan = self._sums.get((tensor.numel(), strategy, group.deterministic, x % _ALIGNMENT), (tensor,))
        if plan is None:
            return None
        entry = group._begin("all_reduce", plan.shape, plan.dtype, strategy)
        total = tensor if in_place else plan.make()
        y = total.data_ptr()
        with group._flight:
            group.launcher.launch(plan.pieces, (tensor, tensor, tensor, total, total), addresses=(x, x, x, y, y))
        entry[watch.END] = watch.now()
        return total

    def keep_all_reduce(self, tensor: Tensor, total: Tensor, strategy: str, tuning: Tuning) -> None:
        group = self._group
        if tensor.is_contiguous() and tensor.numel():
            pieces = group.launcher.all_reduce(tensor, total, tuning, launch=False)
            key = tensor.numel(), strategy, group.deterministic, tensor.data_ptr() % _ALIGNMENT
            self._sums.keep(key, (tensor,), _Plan(tensor.shape, tensor.dtype, _like(total), pieces))

    def fused(
        self, tensors: tuple[Tensor, Tensor, Tensor], norm: tuple[float, float], strategy: str
    ) -> tuple[Tensor, Tensor] | None:
        """Sum of the first, residual add of the second and RMSNorm by the third, if there is a plan for them.

        norm  eps and weight_bias
        """
        group, (tensor, residual, weight) = self._group, tensors
        x, carried, gain = tensor.data_ptr(), residual.data_ptr(), weight.data_ptr()
        key = tensor.numel(), strategy, group.deterministic, (x | carried | gain) % _ALIGNMENT
        plan = self._norms.get(key, tensors)
        if plan is None:
            return None
        entry = group._begin("all_reduce_residual_rms_norm", plan.shape, plan.dtype, strategy, *norm)
        normed, total = plan.make(), plan.make()
        addresses = x, carried, gain, normed.data_ptr(), total.data_ptr()
        with group._flight:
            group.launcher.launch(plan.pieces, (tensor, residual, weight, normed, total), norm, addresses)
        entry[watch.END] = watch.now()
        return normed, total

    def keep_fused(
        self, tensors: tuple[Tensor, Tensor, Tensor], norm: tuple[float, float], results: tuple[Tensor, Tensor],
        strategy: str, tuning: Tuning,
    ) -> None:  # fmt: skip
        group, x = self._group, tensors[0]
        if x.numel() and all(each.is_contiguous() for each in tensors):
            pieces = group.launcher.fused(*tensors, *norm, *results, tuning, launch=False)
            begins = [each.data_ptr() for each in tensors]
            key = x.numel(), strategy, group.deterministic, (begins[0] | begins[1] | begins[2]) % _ALIGNMENT
            self._norms.keep(key, tensors, _Plan(x.shape, x.dtype, _like(results[0]), pieces))

    def all_gather(self, tensor: Tensor, dim: int, sizes: Sequence[int] | None) -> Tensor | None:
        """All ranks' tensors joined, if there is a plan for it."""
        group, x = self._group, tensor.data_ptr()
        key = tensor.numel(), dim, None if sizes is None else tuple(sizes), x % _ALIGNMENT
        plan = self._gathers.get(key, (tensor,))
        if plan is None:
            return None
        entry = group._begin("all_gather", plan.shape, plan.dtype, "", *plan.details)
        joined = plan.make()
        with group._flight:
            group.launcher.launch(plan.pieces, (tensor, joined), addresses=(x, joined.data_ptr()))
        entry[watch.END] = watch.now()
        return joined

    def keep_all_gather(
        self, tensor: Tensor, joined: Tensor, dim: int, sizes: Sequence[int] | None, lengths: tuple[int, ...]
    ) -> None:
        """`sizes` as they were given, `lengths` as they are."""
        if tensor.is_contiguous():
            axis = dim % tensor.dim()
            pieces = self._group.launcher.gather(tensor, joined, stretch_bytes(tensor, axis), launch=False)
            key = tensor.numel(), dim, None if sizes is None else tuple(sizes), tensor.data_ptr() % _ALIGNMENT
            plan = _Plan(tensor.shape, tensor.dtype, _like(joined), pieces, (axis, lengths))
            self._gathers.keep(key, (tensor,), plan)


def _like(tensor: Tensor) -> Callable[[], Tensor]:
    """Makes contiguous tensors of this shape and type."""
    return allocator(tuple(tensor.shape), tensor.dtype, tensor.device)


def stretch_bytes(tensor: Tensor, dim: int) -> int:
    """Bytes of a tensor that stay together where tensors are joined along `dim`."""
    return math.prod(tensor.shape[dim:]) * tensor.element_size()
