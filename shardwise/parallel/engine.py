"""The engine: loads this rank's part of a model and generates. Every rank calls it alike and gets the same result."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardwise.comm.rank import Groups
from shardwise.ops.triton_support import interpreting
from shardwise.parallel import device_cache, paged
from shardwise.parallel.assemble import DecoderBuilder
from shardwise.parallel.cache import KvCache, SlotCache
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.fitting import Holding, require_memory
from shardwise.parallel.memory import memory_bytes
from shardwise.parallel.options import (
    DTYPES,
    KERNEL_PATHS,
    require_attention,
    require_decode,
    require_known,
    require_page,
)
from shardwise.parallel.paged import PagedCache
from shardwise.parallel.prompts import Prompt, PromptLimits
from shardwise.parallel.requests import RequestContext, make_requests
from shardwise.parallel.results import Completion, CompletionCollector, RankStats, TokenEvent
from shardwise.parallel.runner import Runner
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.scheduler import Request, Scheduler
from shardwise.parallel.sizing import activation_bytes, pages_for, slots_for
from shardwise.parallel.step_loop import StepLoop
from shardwise.parallel.storage import left_out
from shardwise.parallel.supported import context
from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer, load_tokenizer
from shardwise.parallel.weight_form import WeightForm
from shardwise.parallel.weights import Progress, Weights
from shardwise.sharding.checkpoint.resolve import Checkpoint, open_checkpoint
from shardwise.sharding.plan import Plan

MAX_BATCH = 64
STEP_TOKENS = 2048
"""Tokens of one step at most: bounds activations and how long a running request waits for a new prompt."""
UNBOUNDED_TOKENS = 1 << 18
"""Of a sequence at most, on a GPU, where the model does not say how many: bounds the page table."""


class Engine:
    """One rank's end of a running model.

    model        what `open_checkpoint` takes, or a Checkpoint
    plan         a plan of that model; its layout has the size of `groups.world`
    dtype        of weights and activations: a torch dtype, its name, or "auto" (float32 on the CPU, bfloat16 on GPUs)
    weights      "native": quantised weights stay packed where a layer can use them (integers of 4 and 8 bits in groups
                 and GGUF's such types on the CPU; float8, 4-bit integers and MXFP4 experts on GPUs); "dequantised":
                 they become `dtype`; "auto": dequantised on the CPU, on GPUs native where that is possible
    cache_tokens tokens that the KV cache holds, in pages that requests share; None: a row for each running request on
                 the CPU, pages where windows are shorter than rows, what the weights leave of the memory on a GPU
    decode       which code runs steps of single tokens, see `Runner`
    attention    whose kernels attend to prompts on a GPU: auto, triton, flashinfer or torch
    request_tokens of the longest request that is to come, prompt and answer, as far as that is known
    tokenizer    the checkpoint's, where it was read already; None: it is read when a prompt or a token needs it
    on_progress  called with (bytes read, bytes to read) while the weights load
    DoesNotFit, on all ranks, before a weight is read: where weights, the cache (of `cache_tokens`, or for one such
    request) and activations are more than a GPU or a host has free.

    For measurements and tests: `decoder` is this rank's part of the model, `runner` runs its steps, `cache` is the one
    of the last call (None before the first), `cache_shapes` has what a cache of this model needs to know of each layer.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        plan: Plan,
        groups: Groups,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        weights: str = "auto",
        cache_tokens: int | None = None,
        decode: str = "auto",
        attention: str = "auto",
        request_tokens: int = 1,
        tokenizer: Tokenizer | IdTokenizer | None = None,
        on_progress: Progress | None = None,
    ):
        started = time.perf_counter()
        if plan.layout.world != groups.world.size:
            raise ValueError(f"the plan is for {plan.layout.world} ranks, the job has {groups.world.size}")
        self.plan, self.groups, self.cache_tokens = plan, groups, cache_tokens
        self.device = _numbered(torch.device(device))
        self.dtype = _dtype(dtype, self.device)
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        require_attention(attention, self.device.type)
        require_decode(decode, self.device.type, interpreted=interpreting())
        self._attention = attention
        kernels = self.device.type == "cuda" or decode in KERNEL_PATHS
        require_page(cache_tokens, "cuda" if kernels else "cpu")
        if kernels and self.device.type == "cpu" and cache_tokens is None:
            raise ValueError(f"decode {decode} on the CPU, in Triton's interpreter: name the size of its cache_tokens")
        self._form = WeightForm.choose(weights, plan.model, self.dtype, self.device, kernels=kernels)
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self._require_memory(request_tokens)
        source = Weights(
            self.checkpoint,
            plan,
            groups.world.rank,
            dtype=self.dtype,
            device=self.device,
            native=self._form.native_blocks,
            packs_mxfp4=self._form.packs_mxfp4,
            keeps_float8=self._form.keeps_float8,
            keeps_int4=self._form.keeps_int4,
            on_progress=on_progress,
        )
        with torch.inference_mode(), self._here(), closing(source):
            builder = DecoderBuilder(source, groups)
            self.decoder = builder.build()
            self.runner = Runner(self.decoder, self.device, decode)
        self._weight_bytes = memory_bytes(self.decoder)
        told = self._form.reason, source.describe_dequantised(), left_out(plan.model)
        self._weights = "; ".join(filter(None, told))
        self.cache_shapes = builder.cache_shapes()
        self.cache: KvCache | None = None
        self._running = False
        self._load_seconds = time.perf_counter() - started

    def close(self) -> None:
        """Let captured graphs go, before their groups are closed: NCCL waits for them. The last call of all."""
        self.runner.graphs = None

    @cached_property
    def tokenizer(self) -> Tokenizer | IdTokenizer:
        return load_tokenizer(self.checkpoint)

    @property
    def decode_path(self) -> str:
        """Which code runs the steps that decode, and why."""
        return self.runner.describe()

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return context(self.plan.model) or sys.maxsize

    @property
    def capacity(self) -> int:
        """Tokens of one sequence that the cache can hold. A GPU's cache is made for it, if it is not there yet."""
        if self.runner.needs_device_cache:
            return self._device_cache.max_length
        return self.max_length if self.cache_tokens is None else self._host_pages * paged.PAGE_SIZE

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in their order. Arguments and errors as for `stream`."""
        requests = make_requests(prompts, params, self._request_context())
        collector = CompletionCollector([len(request.prompt) for request in requests])
        for event in self._run(requests):
            collector.add(event)
        return collector.completions()

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TokenEvent]:
        """Tokens of all prompts as they come; `params` for all prompts or one for each.

        ValueError, on all ranks, for an empty prompt, one that leaves no room in the context, or one that the cache
        cannot hold with its answer. Leaving the iterator early aborts what is unfinished: every rank must leave it
        after the same event.
        """
        yield from self._run(make_requests(prompts, params, self._request_context()))

    def stats(self) -> RankStats:
        return RankStats(
            rank=self.groups.world.rank,
            weight_bytes=self._weight_bytes,
            cache_bytes=self.cache.nbytes() if self.cache else 0,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            load_seconds=self._load_seconds,
            decode=self.decode_path,
            weights=self._weights,
            cache=self._describe_cache(),
        )

    def _describe_cache(self) -> str:
        cache = self.cache
        if isinstance(cache, DeviceCache):
            return f"{cache.tables.describe()}{cache.states.describe()}; prompts: {cache.describe_attention()}"
        if isinstance(cache, PagedCache):
            return cache.tables.describe() + cache.states.describe()
        return f"{cache.slots} rows of {cache.max_length} tokens{cache.states.describe()}" if cache else "none yet"

    def _require_memory(self, request_tokens: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of an earlier model in this process
        asked = self.cache_tokens is not None
        holding = Holding(
            dtype=self.dtype,
            form=self._form,
            device=self.device.type,
            tokens=self.cache_tokens or min(request_tokens, self.max_length),
            sequences=MAX_BATCH if asked or self.device.type == "cuda" else 1,
            step_tokens=STEP_TOKENS,
        )
        require_memory(self.plan, holding, world=self.groups.world, device=self.device, asked=asked)

    def _request_context(self) -> RequestContext:
        limits = PromptLimits(self.plan.model.vocab, self.max_length, self.capacity)
        return RequestContext(self.tokenizer, limits, self.groups.world, self.device)

    def _run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        if self._running:
            raise RuntimeError("the engine is in the middle of another stream: exhaust or close that one first")
        self._running = True
        try:
            with self._here():
                cache = self._cache_for(requests)
            scheduler = Scheduler(cache=cache, step_tokens=STEP_TOKENS, max_length=self.max_length, device=self.device)
            loop = StepLoop(self.groups, self.runner, scheduler, self.tokenizer, self.max_length, self._here)
            yield from loop.run(requests)
        finally:
            self._running = False

    def _here(self) -> AbstractContextManager:
        """Makes the engine's GPU the current one, which each thread that calls has of its own."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _cache_for(self, requests: list[Request]) -> KvCache:
        """The cache for these requests, which the data-parallel groups share out in turn: rows as long as the longest
        may become, or pages."""
        longest = max((len(r.prompt) + r.params.max_new_tokens for r in requests), default=1)
        share = -(-len(requests) // self.groups.attn_dp.size)
        length, slots = min(longest, self.max_length), max(1, min(share, MAX_BATCH))
        if self.runner.needs_device_cache:
            self.cache = self._device_cache
        elif self.cache is None or self.cache.max_length < length or self.cache.slots < slots:
            self.cache = None
            self.runner.use(None)
            self.cache = self._host_cache(length, slots)
        self.runner.use(self.cache)
        return self.cache

    def _host_cache(self, length: int, slots: int) -> KvCache:
        """`cache_tokens` in pages; or space for `slots` sequences of `length` tokens, in rows where all layers keep all
        of them."""
        shapes, dtype, device = self.cache_shapes, self.dtype, self.device
        if self.cache_tokens is not None:
            pages, slots, length = self._host_pages, MAX_BATCH, self.max_length
        elif all(shape.window is None or shape.window >= length for shape in shapes):
            return SlotCache(shapes, slots=slots, max_length=length, dtype=dtype, device=device)
        else:
            pages = slots * -(-length // paged.PAGE_SIZE)
        return PagedCache(shapes, pages=pages, slots=slots, max_length=length, dtype=dtype, device=device)

    @property
    def _host_pages(self) -> int:
        return (self.cache_tokens or 0) // paged.PAGE_SIZE

    @cached_property
    def _device_cache(self) -> DeviceCache:
        shapes, dtype, most = self.cache_shapes, self.dtype, context(self.plan.model) or UNBOUNDED_TOKENS
        work = activation_bytes(self.plan.model, STEP_TOKENS, dtype)
        place: dict[str, Any] = dict(activations=work, world=self.groups.world, device=self.device)
        pages = None if self.cache_tokens is None else self.cache_tokens // device_cache.PAGE_SIZE
        slots = slots_for(shapes, dtype, most=MAX_BATCH, pages=pages, **place)
        return DeviceCache(
            shapes,
            pages=pages or pages_for(shapes, dtype, slots=slots, max_length=most, **place),
            slots=slots,
            max_length=most,
            dtype=dtype,
            device=self.device,
            attention=self._attention,
        )


def _numbered(device: torch.device) -> torch.device:
    """A CUDA device with its number, as tensors have it."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    require_known("dtype", dtype, DTYPES)
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)
