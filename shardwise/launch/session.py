"""One rank's end of a loaded model: groups, plan and engine, and the loop that serves its parent's commands.

Under the user's own torchrun or mpirun there is no parent: `LLM` and `run` open a `Session` in every rank and call it
alike (SPMD).
"""

import gc
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.launch.model_config import ModelConfig, checkpoint_of, plan_of
from shardwise.parallel import options
from shardwise.parallel.results import Completion, CompletionCollector, RankStats, TokenEvent
from shardwise.parallel.sampler import SamplingParams

if TYPE_CHECKING:
    from shardwise.comm.rank import RankInfo
    from shardwise.launch.worker import RankContext

SERVE = "shardwise.launch.session:serve"
"""The job target of a model that waits for its parent's commands."""
LEAVE = "leave"
"""The parent's word that nobody waits for the rest of a call."""
LOOK_SECONDS = 0.25
"""Between two looks whether the caller left; a look takes ranks on one host 0.03 ms."""
PROGRESS_STEPS = 100
"""Progress events per load at most, so that a fast disk is not slowed by telling of it."""


@dataclass(frozen=True)
class Answer:
    """One call's completions, with its times in seconds."""

    completions: tuple[Completion, ...]
    time_to_first_token: float
    """From the call to the first token of the first prompt that got one."""
    seconds: float
    """From the call to the last token."""

    @property
    def new_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """Decode rate behind the first token; of the whole call when it gave one token only."""
        decoding = self.seconds - self.time_to_first_token
        if self.new_tokens > 1 and decoding > 0:
            return (self.new_tokens - 1) / decoding
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Answer":
        completions = [{**each, "token_ids": tuple(each["token_ids"])} for each in data["completions"]]
        return cls(**{**data, "completions": tuple(Completion(**each) for each in completions)})


class Session:
    """A model on this rank. Every rank makes the same calls; all get the same events."""

    def __init__(self, context: "RankContext", config: ModelConfig):
        from shardwise.comm.rank import use_groups
        from shardwise.comm.strategy import make_groups

        self.context, self.config, self._trace = context, config, config.trace
        self.device = choose_device(config.device, context.info)
        options.require_transport(config.transport, self.device)
        plan, checkpoint = plan_of(config), checkpoint_of(config)
        world = context.communicator(device=self.device.split(":")[0], transport=config.transport)
        groups = make_groups(world, plan.layout)
        self.transport = groups.transports
        self._stack = ExitStack()
        self._stack.callback(world.close)
        self._stack.enter_context(use_groups(groups))
        with context.phase("load"):
            from shardwise.parallel.engine import Engine
            from shardwise.parallel.tokenizer import load_tokenizer

            self.engine = Engine(
                checkpoint,
                plan,
                groups,
                **config.for_engine,
                device=self.device,
                tokenizer=load_tokenizer(checkpoint),  # before weights: a broken one is told at once
                on_progress=self._progress(),
            )
            world.barrier()

    def stream(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams]
    ) -> Generator[TokenEvent | Answer, None, None]:
        """Tokens as they come, then the Answer."""
        from shardwise.parallel.prompts import encode

        started, first = time.perf_counter(), None
        ids = [encode(prompt, self.engine.tokenizer) for prompt in prompts]
        collector = CompletionCollector([len(each) for each in ids])
        with self.context.phase("run"), self._traced():
            for event in self.engine.stream(ids, params):
                first = first or time.perf_counter()
                collector.add(event)
                yield event
        ended = time.perf_counter()
        yield Answer(tuple(collector.completions()), (first or ended) - started, ended - started)

    @contextmanager
    def _traced(self) -> Iterator[None]:
        """Trace the steps of the session's first call, where that was asked for."""
        folder, self._trace = self._trace, None
        if folder is None:
            yield
            return
        from shardwise.parallel.chrome_trace import ChromeTrace
        from shardwise.parallel.trace import watched_by

        trace = ChromeTrace(Path(folder), self.context.info.rank, self.device, self.engine.device)
        try:
            with watched_by(trace):
                yield
        finally:
            trace.close()  # also of a call that was left early: it would record on, with nobody to end it

    def stats(self) -> RankStats:
        return self.engine.stats()

    def close(self) -> None:
        try:
            self.engine.close()
        finally:
            self._stack.close()

    def _progress(self) -> Callable[[int, int], None] | None:
        """Rank 0 tells how far it is, rarely."""
        if self.context.info.rank:
            return None
        told = -1

        def progress(done: int, total: int) -> None:
            nonlocal told
            step = done * PROGRESS_STEPS // max(1, total)
            if step != told:
                told = step
                self.context.emit("progress", done=done, total=total)

        return progress


def choose_device(wanted: str, info: "RankInfo") -> str:
    """cpu, or a cuda device for this rank. NotOffered when cuda is asked for and not there.

    Ranks never share a device: `comm.strategy.create` refuses that, since only there ranks see each other's.
    """
    options.require_known("device", wanted, options.DEVICES)
    if wanted == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count()
    if not count and wanted == "auto":
        return "cpu"
    if not count:
        raise options.NotOffered("device cuda: no CUDA device is visible to this rank; legal here: cpu")
    device = f"cuda:{info.local_rank % count}"
    torch.cuda.set_device(device)
    return device


def serve(context: "RankContext") -> None:
    """Load the model of `payload`, then answer the parent's commands until it says stop."""
    session = Session(context, ModelConfig(**context.payload))
    gc.freeze()  # else a full collection looks through a loaded model and its libraries: 0.1 s amid the tokens
    capacity, stats = session.engine.capacity, asdict(session.stats())
    assert context.link is not None
    with context.phase("idle"):  # told before the parent hears that the rank is ready
        context.emit("ready", transport=session.transport, device=session.device, capacity=capacity, stats=stats)
        for command in context.link.commands():
            if command["command"] == LEAVE:
                continue  # of a call that has ended
            _answer(context, session, command)
    with context.phase("stop"):
        session.close()


def _answer(context: "RankContext", session: Session, command: dict) -> None:
    """Serve one call, until it is answered or the caller has left."""
    params = [params_from_json(each) for each in command["params"]]
    left = _Left(context, session, command["call"])
    with closing(session.stream(command["prompts"], params)) as items:
        for item in items:
            if context.info.rank == 0:
                _pass_on(context, item)
            if isinstance(item, TokenEvent) and left(item):
                break
    context.emit("stats", **asdict(session.stats()))


class _Left:
    """Whether the caller has left the call. Rank 0 hears of it; all ranks must leave after the same event."""

    def __init__(self, context: "RankContext", session: Session, call: int):
        self._link = context.link if context.info.rank == 0 else None
        self._call = call
        self._world = session.engine.groups.world
        self._seen: set[int] = set()
        self._steps, self._every, self._looked = 0, 1, time.monotonic()

    def __call__(self, event: TokenEvent) -> bool:
        """Asked after each event. The ranks agree every few steps, as many as take LOOK_SECONDS on rank 0; the second
        event of a request shows that a new step has begun."""
        if event.request not in self._seen:
            self._seen.add(event.request)
            return False
        self._seen = {event.request}
        self._steps += 1
        if self._steps < self._every:
            return False
        now = time.monotonic()
        every = max(1, int(self._steps * LOOK_SECONDS / max(now - self._looked, 1e-6)))
        left, self._every = self._world.broadcast_object((self._told(), every))
        self._steps, self._looked = 0, now
        return left

    def _told(self) -> bool:
        while self._link is not None and (command := self._link.take(LEAVE)) is not None:
            if command["call"] == self._call:  # else of one that had ended before this one began
                return True
        return False


def _pass_on(context: "RankContext", item: TokenEvent | Answer) -> None:
    if isinstance(item, TokenEvent):
        context.emit("token", **asdict(item))
    else:
        context.emit("answer", answer=item.to_json())


def params_to_json(params: SamplingParams) -> dict:
    return asdict(params)


def params_from_json(data: dict) -> SamplingParams:
    return replace(SamplingParams(), **data)
