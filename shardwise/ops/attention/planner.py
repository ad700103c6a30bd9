"""FlashInfer wrappers, planned once a step and shared by all layers.

A plan cuts one step's ragged batch into work for the device. It is made on the host, from host metadata, by the
first layer that needs it; the operator that prepares a step's metadata makes the plans of the last step stale. So a
device runs one step at a time: threads that share one take turns.

Under CUDA graphs a plan must be renewed outside the graph, in buffers that stay. Inside `decode_graphs()` decode
batches use wrappers with such buffers, one for each batch size and power of two of a cache's pages. They are kept, as
graphs may hold them:

    with decode_graphs():
        step()                              # creates and plans the wrappers
        with torch.cuda.graph(graph): step()
    ...
    replan_decode(host metadata of the next step); graph.replay()
"""

import contextlib
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.attention.tiles import power_of_two
from shardwise.ops.state_batch import prefill_bounds

# FlashInfer asks for 128 MB; large batches of split sequences with 256-wide heads need twice that.
WORKSPACE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Pages:
    """Host metadata of the sequences [first, last) of a paged step, and their pages on the device."""

    indptr: torch.Tensor
    """int32 [n + 1] on the host, starts at 0"""
    indices: torch.Tensor
    """int32 [indptr[-1]], page ids"""
    last_page_len: torch.Tensor
    """int32 [n] on the host"""
    lengths: torch.Tensor
    """int32 [n] on the host, tokens in the cache after this step"""

    @property
    def sequences(self) -> int:
        return self.lengths.numel()


def exact_metadata(batch: Batch, *entries: torch.Tensor) -> bool:
    """Whether batch indices, positions, cu_num_pages and last_page_len are dense, without entries beyond the batch."""
    counts = [batch.tokens, batch.tokens, batch.sequences + 1, batch.sequences]
    return all(each.is_contiguous() for each in entries) and [len(each) for each in entries] == counts


def without_padding(batch: Batch, indices, positions, indptr, last) -> tuple[torch.Tensor, ...]:
    """Those entries of the same that belong to the batch, dense."""
    tokens, sequences = batch.tokens, batch.sequences
    entries = indices[:tokens], positions[:tokens], indptr[: sequences + 1], last[:sequences]
    return tuple(each.contiguous() for each in entries)


PagesHost = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host: pages of all sequences of a step"""


def prefill_starts(op: str, batch: Batch, cu_seqlen_host: torch.Tensor) -> torch.Tensor:
    """int32 [prefill + 1] on the CPU, for FlashInfer, which checks nothing. ValueError for bounds of other tokens."""
    return torch.tensor(prefill_bounds(op, batch, cu_seqlen_host), dtype=torch.int32)


def select_pages(
    first: int,
    last: int,
    cu_num_pages_host: torch.Tensor,
    cache_loc: torch.Tensor,
    last_page_len_host: torch.Tensor,
    seq_len_with_cache_host: torch.Tensor,
) -> Pages:
    """The pages of sequences [first, last). TypeError and ValueError for tables that are not int32, or too short."""
    tables = cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host
    names = "cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host"
    if any(each.dtype != torch.int32 for each in tables):
        raise TypeError(f"{names} are {', '.join(str(each.dtype) for each in tables)}; legal: int32")
    lengths = [each.numel() if each.dim() == 1 else -1 for each in tables]
    end = int(cu_num_pages_host[last]) if lengths[0] > last else 0
    wanted = [last + 1, end, last, last]
    if any(length < least for length, least in zip(lengths, wanted, strict=True)):
        shapes = ", ".join(str(list(each.shape)) for each in tables)
        raise ValueError(f"{names} have shapes {shapes}; legal for {last} sequences: {wanted} entries and more")
    indptr = cu_num_pages_host[first : last + 1].contiguous()
    begin = int(indptr[0])
    return Pages(
        indptr if begin == 0 else indptr - begin,
        cache_loc[begin:end].contiguous(),
        last_page_len_host[first:last].contiguous(),
        seq_len_with_cache_host[first:last].contiguous(),
    )


@dataclass
class Planner:
    """The wrappers of one device and one family of operators, and which of them hold the current step's plan."""

    device: torch.device
    graphs: bool = False
    """Whether decode batches use wrappers that CUDA graphs can hold."""
    _wrappers: dict[tuple, Any] = field(default_factory=dict)
    _planned: dict[tuple, Any] = field(default_factory=dict)
    """Those of the wrappers that hold this step's plan"""
    _replans: dict[tuple, Callable[[Pages], None]] = field(default_factory=dict)

    @functools.cached_property
    def workspace(self) -> torch.Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)

    def reset(self) -> None:
        """Make all plans stale; inside a graph capture they stay, for a captured kernel uses them at every replay."""
        if not self._capturing():
            self._planned.clear()

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def current(self, key: tuple) -> Any:
        """The wrapper of `key` if it holds this step's plan, else None: what all layers but a step's first ask for."""
        return self._planned.get(key)

    def planned(self, key: tuple, create: Callable[[], Any], plan: Callable[[Any], None]) -> Any:
        """The wrapper of `key`, created at its first use and planned at its first use in a step."""
        if key in self._planned:
            return self._planned[key]
        if self._capturing():
            raise RuntimeError(
                f"a FlashInfer plan for {key} is needed inside a CUDA graph capture, where none can be made; "
                "run the same step once inside decode_graphs() before capturing it"
            )
        if key not in self._wrappers:
            self._wrappers[key] = create()
        plan(self._wrappers[key])
        self._planned[key] = self._wrappers[key]
        return self._wrappers[key]

    def decode_wrapper(
        self, family: "DecodeFamily", parameters: Hashable, batch: Batch, page_count: int, host: PagesHost
    ) -> Any:
        """The wrapper for a step's decode sequences over a cache of so many pages.

        They share one for `parameters`; with `graphs` on, those of one batch size do, in fixed buffers for the pages of
        caches up to the next power of two.
        """
        key: tuple = ("decode", parameters)
        if self.graphs:
            key = ("graph", parameters, power_of_two(page_count, least=1), batch.decode)
        return self._planned.get(key) or self._planned_decode(key, family, batch, host)

    def _planned_decode(self, key: tuple, family: "DecodeFamily", batch: Batch, host: PagesHost) -> Any:
        parameters = key[1]

        def create():
            if not self.graphs:
                return family.create(self, None)
            wrapper = family.create(self, GraphBuffers.of(batch.decode, key[2], self.device))
            self._replans[key] = lambda renewed: family.plan(parameters, wrapper, renewed)
            return wrapper

        return self.planned(
            key, create, lambda w: family.plan(parameters, w, select_pages(batch.prefill, batch.sequences, *host))
        )

    def replan(self, pages: Pages) -> int:
        """Renew the plans of the graph wrappers of this batch size; returns how many there are."""
        count = pages.indices.numel()  # a wrapper with less room is of another cache
        found = [key for key in self._replans if key[-1] == pages.sequences and key[-2] >= count]
        for key in found:
            self._replans[key](pages)
            self._planned[key] = self._wrappers[key]
        return len(found)


@dataclass(frozen=True)
class GraphBuffers:
    """Device buffers of a wrapper that a CUDA graph holds."""

    qo_indptr: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    @classmethod
    def of(cls, sequences: int, page_count: int, device: torch.device) -> "GraphBuffers":
        """`page_count` is no less than the most pages that the batch can hold: all of the cache."""

        def zeros(count):
            return torch.zeros(count, dtype=torch.int32, device=device)

        return cls(zeros(sequences + 1), zeros(sequences + 1), zeros(page_count), zeros(sequences))


@dataclass(frozen=True)
class DecodeFamily:
    """How one operator's decode wrapper is made and planned."""

    create: Callable[[Planner, GraphBuffers | None], Any]
    plan: Callable[[Any, Any, Pages], None]
    """Given parameters, wrapper and pages"""


_PLANNERS: dict[tuple[str, torch.device], Planner] = {}


def planner(family: str, device: torch.device) -> Planner:
    """The planner of an operator family ("attention", "mla") on a device."""
    key = (family, device)
    found = _PLANNERS.get(key)
    return found or _PLANNERS.setdefault(key, Planner(device, graphs=_graphs_on))


_graphs_on = False


@contextlib.contextmanager
def decode_graphs():
    """Let decode batches use wrappers whose buffers stay, so that the step can be captured in a CUDA graph."""
    global _graphs_on
    before = _graphs_on
    _switch(True)
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    global _graphs_on
    _graphs_on = on
    for each in _PLANNERS.values():
        each.graphs = on


def replan_decode(
    cu_num_pages_host: torch.Tensor,  # int32 [B + 1]
    cache_loc: torch.Tensor,  # int32 on the device
    last_page_len_host: torch.Tensor,  # int32 [B]
    seq_len_with_cache_host: torch.Tensor,  # int32 [B]
) -> None:
    """Plan the captured decode graphs of batch size B for the step that is replayed next, on cache_loc's device."""
    count = last_page_len_host.numel()
    pages = select_pages(0, count, cu_num_pages_host, cache_loc, last_page_len_host, seq_len_with_cache_host)
    owners = [each for (_, device), each in _PLANNERS.items() if device == cache_loc.device]
    if not sum(owner.replan(pages) for owner in owners):
        raise ValueError(
            f"no decode graph of batch size {count} was prepared on {cache_loc.device} inside decode_graphs()"
        )
