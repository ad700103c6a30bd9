"""The loop that answers requests: one step after another, the next one launched while a step is still under way."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from shardwise.comm.rank import Groups
from shardwise.parallel.results import TokenEvent
from shardwise.parallel.runner import Launched, Runner
from shardwise.parallel.scheduler import Request, Scheduler, Step
from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer
from shardwise.parallel.trace import DECODE, PREFILL, SAMPLE, SCHEDULE, span


@dataclass(frozen=True)
class _Running:
    """A step under way."""

    step: Step
    launched: Launched


@dataclass(frozen=True)
class StepLoop:
    """Of the requests of one call. Every rank runs it alike."""

    groups: Groups
    runner: Runner
    scheduler: Scheduler
    tokenizer: Tokenizer | IdTokenizer
    max_length: int
    """Tokens that prompt and answer may have together."""
    here: Callable[[], AbstractContextManager]
    """Makes the engine's device the current one."""

    def run(self, requests: list[Request]) -> Iterator[TokenEvent]:
        """Tokens of all requests as they come; numbers of requests are their places. Leaving early ends the rest."""
        own = requests[self.groups.attn_dp.rank :: self.groups.attn_dp.size]
        self.scheduler.add(own)
        unfinished = {request.number for request in requests}
        running: _Running | None = None
        try:
            while unfinished:
                running = running or self._launch(self.scheduler.next_step)
                following = self._ahead(running)
                for number, token in self._read(running):
                    if number not in unfinished:  # it ended in the step before, when this one was under way
                        continue
                    event = self._accept(requests[number], token)
                    if event.finished:
                        unfinished.remove(number)
                        self.scheduler.finish(requests[number])
                    yield event
                running = following
        finally:
            for request in own:
                self.scheduler.finish(request)

    def _launch(self, schedule: Callable[[], Step]) -> _Running:
        with span(SCHEDULE):
            step = schedule()
        # Entered for each step: a generator that is suspended inside would leave its caller in inference mode.
        with self.here(), span(PREFILL if step.batch.prefills else DECODE), torch.inference_mode():
            return _Running(step, self.runner.launch(step))

    def _ahead(self, running: _Running) -> _Running | None:
        """The step after the running one, launched before that one's tokens are known, where it can be."""
        greedy = all(request.params.temperature == 0 for request in running.step.sampled)
        if not self.runner.runs_ahead or not greedy or running.step.batch.prefills or self.groups.attn_dp.size > 1:
            return None
        if not self.scheduler.may_go_ahead(running.step):
            return None
        return self._launch(lambda: self.scheduler.next_ahead(running.step))

    def _read(self, running: _Running) -> list[tuple[int, int]]:
        """(request, token) pairs of all data-parallel groups; a group without work takes part with no token."""
        with span(SAMPLE):
            tokens = running.launched.tokens()
        self.groups.check_waits()
        pairs = [(request.number, token) for request, token in zip(running.step.sampled, tokens, strict=True)]
        if self.groups.attn_dp.size == 1:
            return pairs
        return [pair for group in self.groups.attn_dp.all_gather_object(pairs) for pair in group]

    def _accept(self, request: Request, token: int) -> TokenEvent:
        params = request.params
        request.tokens.append(token)
        if token in params.stop_token_ids or (token in self.tokenizer.stop_ids and not params.ignore_eos):
            return TokenEvent(request.number, token, request.text.flush(), True, "stop", in_answer=False)
        text = request.text.push(token)
        if request.text.stopped:
            return TokenEvent(request.number, token, text, True, "stop")
        length = len(request.prompt) + len(request.tokens)
        if len(request.tokens) == params.max_new_tokens or length == self.max_length:
            return TokenEvent(request.number, token, text + request.text.flush(), True, "length")
        return TokenEvent(request.number, token, text)
