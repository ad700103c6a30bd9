"""Continuous batching: which tokens of which requests make the next step.

Deterministic, so that every rank decides alike without a message.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardwise.parallel.batch import Batch, Span
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
    def pending(self) -> int:
        """Known tokens that the cache lacks; at least 1 while the request runs."""
        return len(self.prompt) + len(self.tokens) - self.cached

    def known(self, start: int, stop: int) -> list[int]:
        """Tokens `[start, stop)` of prompt + generated."""
        split = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(0, start - split) : max(0, stop - split)]


@dataclass(frozen=True)
class Step:
    """A batch, and the requests whose logits it yields, in the order of the rows."""

    batch: Batch
    sampled: list[Request]


class Scheduler:
    """First come, first served. Running requests decode one token a step; prompts fill the rest of `step_tokens`.

    A prompt longer than what is left of a step goes on in the next one (chunked prefill).
    """

    def __init__(self, *, slots: int, step_tokens: int, device: torch.device):
        self.step_tokens, self.device = step_tokens, device
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free = list(range(slots))[::-1]

    def add(self, requests: Sequence[Request]) -> None:
        self.waiting.extend(requests)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_step(self) -> Step:
        """The next batch; the cache positions of its requests count as filled from here on."""
        while self.waiting and self._free:
            request = self.waiting.popleft()
            request.slot = self._free.pop()
            self.running.append(request)
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

    def finish(self, request: Request) -> None:
        """Give back what a request holds, whether it is done or aborted."""
        if request in self.running:
            self.running.remove(request)
            self._free.append(request.slot)
            request.slot = -1
        elif request in self.waiting:
            self.waiting.remove(request)

    def _shares(self) -> list[tuple[Request, int]]:
        """Requests of the next step with their numbers of tokens: decoding ones first, so that they never wait."""
        left = self.step_tokens
        shares: list[tuple[Any, int]] = []
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            length = min(request.pending, left)
            if length == 0:
                break
            shares.append((request, length))
            left -= length
        return shares
