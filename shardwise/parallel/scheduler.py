"""Continuous batching: which tokens of which requests make the next step.

Deterministic, so that every rank decides the same without a message.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import KvCache
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.text import TextStream


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine."""

    number: int
    prompt: list[int]
    params: SamplingParams
    text: TextStream
    generator: torch.Generator | None = None
    tokens: list[int] = field(default_factory=list)
    """Generated so far."""
    cached: int = 0
    """Tokens of prompt + tokens that the cache holds."""
    slot: int = -1

    @property
    def length(self) -> int:
        """Tokens of prompt + generated."""
        return len(self.prompt) + len(self.tokens)

    @property
    def pending(self) -> int:
        """Known tokens that the cache lacks; at least 1 while the request runs and no step of it is under way."""
        return self.length - self.cached

    def known(self, start: int, stop: int) -> list[int]:
        """Tokens `[start, stop)` of prompt + generated."""
        split = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(0, start - split) : max(0, stop - split)]


@dataclass(frozen=True)
class Step:
    """A batch, and the requests whose logits it yields, in the order of the rows."""

    batch: Batch
    sampled: list[Request]
    sources: tuple[int, ...] | None = None
    """Rows of the step before, whose tokens this one begins with while the host has not read them."""


class Scheduler:
    """First come, first served. Running requests decode one token a step; prompts fill the rest of `step_tokens`.

    A prompt begins once the cache has room for all of it; one longer than what is left of a step goes on in the next
    (chunked prefill). When the cache has no space for a running request, the one that came last gives up its place; it
    starts again later with what it generated as part of its prompt. Each step adds tokens to some request, so any
    request that fits the empty cache is finished.

    max_length  of a sequence, prompt and answer
    """

    def __init__(self, *, cache: KvCache, step_tokens: int, max_length: int, device: torch.device):
        self.cache, self.step_tokens, self.max_length, self.device = cache, step_tokens, max_length, device
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""
        self._free = list(range(cache.slots))[::-1]

    def add(self, requests: Sequence[Request]) -> None:
        self.waiting.extend(requests)

    def next_step(self) -> Step:
        """The next batch; the cache positions of its requests count as filled from here on."""
        shares = self._shares()
        shares.sort(key=lambda share: share[1] == 1)  # stable: one-token spans go last
        spans, tokens = [], []
        for request, length in shares:
            start = request.cached
            spans.append(Span(request.slot, start, length, wants_logits=length == request.pending))
            tokens += request.known(start, start + length)
            request.cached += length
        sampled = [request for (request, _), span in zip(shares, spans, strict=True) if span.wants_logits]
        return Step(Batch(spans, tokens, self.device), sampled)

    def may_go_ahead(self, running: Step) -> bool:
        """Whether `next_ahead` may follow a step whose tokens nobody has read yet; it then has cache space.

        Not where the next step has other work.
        """
        going = self._going(running)
        left = [request for request in running.sampled if request in self.running]
        if not going or len(left) != len(self.running) or (self.waiting and self._free):
            return False
        return all(self.cache.reserve(request.slot, request.cached + 1) for _, request in going)

    def next_ahead(self, running: Step) -> Step:
        """One more token for each request of the running step that goes on.

        Stop ids and texts are found out when the tokens are read; what this step gives for such a request is nobody's.
        """
        going = self._going(running)
        spans = [Span(request.slot, request.cached, 1) for _, request in going]
        for _, request in going:
            request.cached += 1
        batch = Batch(spans, [0] * len(spans), self.device)
        return Step(batch, [request for _, request in going], tuple(row for row, _ in going))

    def _going(self, running: Step) -> list[tuple[int, Request]]:
        """Rows and requests of a step that may need another one, as far as is known."""
        return [(row, r) for row, r in enumerate(running.sampled) if r in self.running and self._goes_on(r)]

    def _goes_on(self, request: Request) -> bool:
        """Whether a request whose last step is under way may need another one."""
        return len(request.tokens) + 1 < request.params.max_new_tokens and request.length + 1 < self.max_length

    def finish(self, request: Request) -> None:
        """Give back what a request holds, whether it is done or aborted."""
        if request in self.running:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.release(request.slot)
        self._free.append(request.slot)
        request.slot, request.cached = -1, 0

    def _shares(self) -> list[tuple[Request, int]]:
        """Requests of the next step with their numbers of tokens: decoding ones first, so that they never wait."""
        left = self.step_tokens
        shares: list[tuple[Request, int]] = []
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            length = min(request.pending, left)
            if request.slot < 0 or length == 0 or not self._reserve(request, length, shares):
                continue
            shares.append((request, length))
            left -= length
        while left and self.waiting and self._free:
            request, request_slot = self.waiting[0], self._free[-1]
            length = min(request.pending, left)
            if not self.cache.reserve(request_slot, request.length):  # all of it: else its last chunk may find no room
                break
            self.running.append(self.waiting.popleft())
            request.slot = self._free.pop()
            shares.append((request, length))
            left -= length
        return shares

    def _reserve(self, request: Request, length: int, shares: list[tuple[Request, int]]) -> bool:
        """Cache space for the request's next tokens, if need be by preempting requests that came after it."""
        while not self.cache.reserve(request.slot, request.cached + length):
            scheduled = [other for other, _ in shares]
            later = [r for r in self.running[self.running.index(request) :] if r not in scheduled]
            last = later[-1]
            self._leave(last)
            self.waiting.appendleft(last)
            if last is request:
                return False
        return True
