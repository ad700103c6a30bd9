"""The engine: loads this rank's part of a model and generates. Every rank calls it alike and gets the same result."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from shardwise.comm.rank import Groups
from shardwise.parallel.assemble import DecoderBuilder
from shardwise.parallel.batch import Batch
from shardwise.parallel.cache import KvCache, SlotCache
from shardwise.parallel.memory import memory_bytes
from shardwise.parallel.paged import PAGE_SIZE, PagedCache
from shardwise.parallel.requests import Limits, Prompt, make_requests
from shardwise.parallel.results import Completion, RankStats, TokenEvent
from shardwise.parallel.sampler import SamplingParams, sample
from shardwise.parallel.scheduler import Request, Scheduler
from shardwise.parallel.token_step import TokenStep, reason_against
from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer, load_tokenizer
from shardwise.parallel.trace import DECODE, PREFILL, SAMPLE, SCHEDULE, span
from shardwise.parallel.weights import Progress, Weights
from shardwise.sharding.checkpoint.resolve import Checkpoint, open_checkpoint
from shardwise.sharding.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_FORMS = ("auto", "native", "dequantised")
MAX_BATCH = 64
STEP_TOKENS = 2048
"""Tokens of one step at most: bounds activations and how long a running request waits for a new prompt."""


class Engine:
    """One rank's end of a running model.

    model        what `open_checkpoint` takes, or a Checkpoint
    plan         a plan of that model; its layout has the size of `groups.world`
    dtype        of weights and activations: a torch dtype, its name, or "auto" (float32 on the CPU, bfloat16 on GPUs)
    weights      "native": quantised weights stay in their blocks where a layer can use them (GGUF's 4- and 8-bit types
                 on the CPU); "dequantised": they become `dtype`; "auto": dequantised on the CPU
    cache_tokens tokens that the KV cache holds, in pages that requests share; None: a row for each running request
    on_progress  called with (bytes read, bytes to read) while the weights load
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
        on_progress: Progress | None = None,
    ):
        started = time.perf_counter()
        if plan.layout.world != groups.world.size:
            raise ValueError(f"the plan is for {plan.layout.world} ranks, the job has {groups.world.size}")
        self.plan, self.groups, self.cache_tokens = plan, groups, cache_tokens
        self.device = torch.device(device)
        self.dtype = _dtype(dtype, self.device)
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        if weights not in WEIGHT_FORMS:
            raise ValueError(f"weights {weights!r} is unknown, legal: {', '.join(WEIGHT_FORMS)}")
        if weights == "native" and self.device.type != "cpu":
            raise ValueError("weights native: layers for GGUF blocks exist for the CPU only; use weights auto")
        source = Weights(
            self.checkpoint,
            plan,
            groups.world.rank,
            dtype=self.dtype,
            device=self.device,
            native=weights == "native",
            on_progress=on_progress,
        )
        with torch.inference_mode():
            builder = DecoderBuilder(source, groups)
            self._decoder = builder.build()
        self._token_step = None if reason_against(self._decoder) else TokenStep(self._decoder)
        self._weight_bytes = memory_bytes(self._decoder)
        self._cache_shapes = builder.cache_shapes()
        self._cache: KvCache | None = None
        self._running = False
        self._load_seconds = time.perf_counter() - started

    @cached_property
    def tokenizer(self) -> Tokenizer | IdTokenizer:
        return load_tokenizer(self.checkpoint)

    @property
    def decode_path(self) -> str:
        """Which code runs the steps that decode, and why."""
        reason = reason_against(self._decoder)
        return f"layer by layer: {reason}" if reason else "single-token step for one sequence, else layer by layer"

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.plan.model.max_positions or sys.maxsize

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in their order. Arguments and errors as for `stream`."""
        requests = make_requests(prompts, params, self._limits())
        texts = [""] * len(requests)
        reasons = [""] * len(requests)
        for event in self._run(requests):
            texts[event.request] += event.text
            reasons[event.request] = event.finish_reason or ""
        return [
            Completion(text, self._answer(request), len(request.prompt), reason)
            for request, text, reason in zip(requests, texts, reasons, strict=True)
        ]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TokenEvent]:
        """Tokens of all prompts as they come; `params` for all prompts or one for each.

        ValueError for an empty prompt, or one that leaves no room in the context. Leaving the iterator early aborts
        what is unfinished: every rank must leave it after the same event.
        """
        yield from self._run(make_requests(prompts, params, self._limits()))

    def stats(self) -> RankStats:
        return RankStats(
            rank=self.groups.world.rank,
            weight_bytes=self._weight_bytes,
            cache_bytes=self._cache.nbytes() if self._cache else 0,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            load_seconds=self._load_seconds,
        )

    def _limits(self) -> Limits:
        return Limits(self.tokenizer, self.plan.model.vocab, self.max_length, self.groups.world, self.device)

    def _run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        if self._running:
            raise RuntimeError("the engine is in the middle of another stream: exhaust or close that one first")
        cache = self._cache_for(requests)
        own = requests[self.groups.attn_dp.rank :: self.groups.attn_dp.size]
        scheduler = Scheduler(cache=cache, step_tokens=STEP_TOKENS, device=self.device)
        scheduler.add(own)
        unfinished = len(requests)
        self._running = True
        try:
            while unfinished:
                for number, token in self._step(scheduler, cache):
                    event = self._accept(requests[number], token)
                    if event.finished:
                        unfinished -= 1
                        scheduler.finish(requests[number])
                    yield event
        finally:
            self._running = False
            for request in own:
                scheduler.finish(request)

    def _step(self, scheduler: Scheduler, cache: KvCache) -> list[tuple[int, int]]:
        """(request, token) pairs of all data-parallel groups; a group without work takes part with no token."""
        with span(SCHEDULE):
            step = scheduler.next_step()
        # Entered for each step: a generator that is suspended inside would leave its caller in inference mode.
        with torch.inference_mode():
            with span(PREFILL if step.batch.prefills else DECODE):
                hidden = self._hidden(step.batch, cache)
            with span(SAMPLE):
                tokens = self._sample(hidden, step.sampled)
        self.groups.check_waits()
        pairs = [(request.number, token) for request, token in zip(step.sampled, tokens, strict=True)]
        if self.groups.attn_dp.size == 1:
            return pairs
        return [pair for group in self.groups.attn_dp.all_gather_object(pairs) for pair in group]

    def _hidden(self, batch: Batch, cache: KvCache) -> torch.Tensor:
        if self._token_step is not None and batch.is_single_token and isinstance(cache, SlotCache):
            return self._token_step(batch, cache)
        return self._decoder.hidden(batch, cache)

    def _sample(self, hidden: torch.Tensor, requests: list[Request]) -> list[int]:
        if not requests:  # a chunk of a prompt
            return []
        if all(request.params.temperature == 0 for request in requests):
            return self._decoder.head.best(hidden)
        logits = self._decoder.head(hidden)
        return [sample(row, request.params, request.generator) for row, request in zip(logits, requests, strict=True)]

    def _accept(self, request: Request, token: int) -> TokenEvent:
        params = request.params
        request.tokens.append(token)
        if token in params.stop_token_ids or (token in self.tokenizer.stop_ids and not params.ignore_eos):
            return TokenEvent(request.number, token, request.text.flush(), True, "stop")
        text = request.text.push(token)
        if request.text.stopped:
            return TokenEvent(request.number, token, text, True, "stop")
        length = len(request.prompt) + len(request.tokens)
        if len(request.tokens) == params.max_new_tokens or length == self.max_length:
            return TokenEvent(request.number, token, text + request.text.flush(), True, "length")
        return TokenEvent(request.number, token, text)

    def _answer(self, request: Request) -> tuple[int, ...]:
        params = request.params
        last = request.tokens[-1]
        ended = last in params.stop_token_ids or (last in self.tokenizer.stop_ids and not params.ignore_eos)
        return tuple(request.tokens[:-1] if ended else request.tokens)

    def _cache_for(self, requests: list[Request]) -> KvCache:
        """The cache for these requests, which the data-parallel groups share out in turn.

        Rows as long as the longest may become, or pages of `cache_tokens` tokens. ValueError, on all ranks, when one
        request alone needs more than all pages.
        """
        longest = max((len(r.prompt) + r.params.max_new_tokens for r in requests), default=1)
        share = -(-len(requests) // self.groups.attn_dp.size)
        length, slots = min(longest, self.max_length), max(1, min(share, MAX_BATCH))
        pages = None if self.cache_tokens is None else self.cache_tokens // PAGE_SIZE
        if pages is not None and length > pages * PAGE_SIZE:
            raise ValueError(
                f"a request may become {length} tokens long, the cache holds {pages * PAGE_SIZE} ({pages} pages of "
                f"{PAGE_SIZE}): give it more tokens, or ask for fewer new ones"
            )
        if self._cache is None or self._cache.max_length < length or self._cache.slots < slots:
            self._cache = None
            shapes, dtype, device = self._cache_shapes, self.dtype, self.device
            if pages is None:
                self._cache = SlotCache(shapes, slots=slots, max_length=length, dtype=dtype, device=device)
            else:
                most = self.max_length
                self._cache = PagedCache(shapes, pages=pages, slots=slots, max_length=most, dtype=dtype, device=device)
        return self._cache


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown, legal: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype
