"""Where an `LLM`'s ranks are: in processes that this one started (`ParentExecutor`), or around it (`SpmdExecutor`)."""

import atexit
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from shardwise.comm.rank import RankInfo
from shardwise.comm.watch import Deadlines
from shardwise.launch import guard
from shardwise.launch.job import Job, JobFailed
from shardwise.launch.model_config import ModelConfig, checkpoint_of
from shardwise.launch.session import LEAVE, SERVE, Answer, Session, params_to_json
from shardwise.launch.start import backend
from shardwise.launch.supervise import Supervisor
from shardwise.parallel.results import RankStats, TokenEvent
from shardwise.parallel.sampler import SamplingParams

if TYPE_CHECKING:
    from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer
    from shardwise.sharding.model import ModelSpec

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read) of rank 0 while the weights load."""


class Executor(Protocol):
    """Where the ranks are: in processes of ours, or around us."""

    transport: str

    def stream(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Iterator[TokenEvent | Answer]: ...

    def stats(self) -> list[RankStats]: ...

    def abort(self) -> None:
        """End at once, without waiting for ranks that are busy."""
        ...

    def close(self) -> None: ...


class ParentExecutor:
    """Ranks that this process started and watches."""

    def __init__(
        self,
        config: ModelConfig,
        model: "ModelSpec",
        launcher: str,
        options: dict,
        on_progress: Progress | None,
        debug: bool = False,
    ):
        self._config, self._model = config, model
        deadlines, started_by = Deadlines.from_environment(), backend(launcher, **options)
        job = Job(target=SERVE, payload=asdict(config), world=config.world, deadlines=deadlines, debug=debug)
        self._silence = deadlines.collective + deadlines.stop
        self._supervisor = Supervisor(job, started_by).__enter__()
        self._turn = threading.RLock()
        """Held by the thread that speaks with the ranks."""
        self._items: _Items | None = None
        self._calls = itertools.count()
        self._closed = False
        self._process = os.getpid()
        """A fork has what this process has, but neither the ranks nor a part in what is said to them."""
        atexit.register(self.close)  # before the spawner thread ends with the interpreter
        try:
            self._tokenizer = self._read_tokenizer()  # while the ranks start
            self._load(deadlines.load, on_progress)
        except BaseException:
            self.abort()
            raise

    def _load(self, seconds: float, on_progress: Progress | None) -> None:
        ready: dict[int, dict] = {}
        self._supervisor.wait_for_ranks()
        while len(ready) < self._supervisor.job.world:
            for event in self._supervisor.next_events(seconds, "the ranks to load the model"):
                if event["event"] == "ready":
                    ready[event["rank"]] = event
                elif event["event"] == "progress" and on_progress is not None:
                    on_progress(event["done"], event["total"])
        self._stats = [RankStats(**ready[rank]["stats"]) for rank in range(len(ready))]
        self.transport = ready[0]["transport"]
        self._capacity = ready[0]["capacity"]

    def stream(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Iterator[TokenEvent | Answer]:
        ids = self._encoded(prompts, params)
        wanted = [params_to_json(each) for each in params]
        if os.getpid() != self._process:
            raise RuntimeError("this LLM belongs to another process, of which this one is a fork: make one here")
        with self._turn:
            _require_ranks(self._supervisor)
            if self._items is not None:
                self._items.wait()
            self._stats = self.stats()
            mine = self._items = _Items(next(self._calls), self._supervisor, self._silence, self._turn)
            self._supervisor.send({"command": "generate", "call": mine.number, "prompts": ids, "params": wanted})
        try:
            yield from mine
        except JobFailed:
            if self._closed:
                raise RuntimeError("this LLM was closed while it generated") from None
            raise
        except BaseException:  # the caller was interrupted, or has closed its iterator
            self._leave(mine)
            raise

    def _leave(self, call: "_Items") -> None:
        """Let the ranks end a call of which nobody takes the rest; whoever has the turn may wait for that."""
        if not call.answered and not self._supervisor.ended and os.getpid() == self._process:
            self._supervisor.send({"command": LEAVE, "call": call.number})

    def _encoded(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[list[int]]:
        """ValueError here; in the ranks it would end them."""
        from shardwise.parallel.prompts import PromptLimits, encode_fitting
        from shardwise.parallel.supported import context

        limits = PromptLimits(self._model.vocab, context(self._model), self._capacity)
        return encode_fitting(prompts, [each.max_new_tokens for each in params], self._tokenizer, limits)

    def _read_tokenizer(self) -> "Tokenizer | IdTokenizer":
        from shardwise.parallel.tokenizer import load_tokenizer

        return load_tokenizer(checkpoint_of(self._config))

    def stats(self) -> list[RankStats]:
        return self._items.stats() if self._items is not None and self._items.answered else self._stats

    def abort(self) -> None:
        self._end(at_once=True)

    def close(self) -> None:
        busy = self._items is not None and not self._items.answered
        self._end(at_once=busy)  # ranks that still generate would hear of it much later

    def _end(self, at_once: bool) -> None:
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not self._turn.acquire(blocking=False):  # another thread listens to the ranks: their end wakes it
            self._supervisor.backend.signal(signal.SIGTERM)
            self._turn.acquire()
        try:
            if at_once:
                self._supervisor.abort()
            else:
                self._supervisor.stop()
        finally:
            self._turn.release()


def _require_ranks(supervisor: Supervisor) -> None:
    if supervisor.ended:
        raise RuntimeError("the ranks of this LLM have ended, after a failure or a close: make a new one")


class _Items:
    """Iterator over one call's tokens and then its Answer; goes on where it was left.

    number  of the call
    turn    held while listening to the ranks
    """

    def __init__(self, number: int, supervisor: Supervisor, silence: float, turn: threading.RLock):
        self.number = number
        self._supervisor, self._silence, self._turn = supervisor, silence, turn
        self._stats: dict[int, RankStats] = {}
        self._waiting: deque[TokenEvent | Answer] = deque()

    @property
    def answered(self) -> bool:
        """Whether every rank has ended this call."""
        return len(self._stats) == self._supervisor.job.world

    def stats(self) -> list[RankStats]:
        """Of the ranks that have ended this call."""
        return [self._stats[rank] for rank in sorted(self._stats)]

    def __iter__(self) -> "_Items":
        return self

    def __next__(self) -> TokenEvent | Answer:
        with self._turn:
            while not self._waiting and not self.answered:
                self._listen()
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def wait(self) -> None:
        """Until every rank has ended this call; what it told is kept."""
        while not self.answered:
            self._listen()

    def _listen(self) -> None:
        _require_ranks(self._supervisor)
        for event in self._supervisor.next_events(self._silence, "the next token"):
            self._book(event)

    def _book(self, event: dict) -> None:
        kind, rank = event.pop("event"), event.pop("rank")
        if kind == "token":
            self._waiting.append(TokenEvent(**event))
        elif kind == "answer":
            self._waiting.append(Answer.from_json(event["answer"]))
        elif kind == "stats":
            self._stats[rank] = RankStats(rank=rank, **event)


class SpmdExecutor:
    """This process is one of the ranks."""

    def __init__(self, config: ModelConfig, info: RankInfo, on_progress: Progress | None):
        from shardwise.launch.worker import context_here

        def on_event(event: dict) -> None:
            if on_progress is not None and event["event"] == "progress":
                on_progress(event["done"], event["total"])

        guard.guard_script(info)
        context = context_here(info, asdict(config), on_event)
        self._open: Session | None = Session(context, config)
        self.transport = self._open.transport
        self._stats = self._all_stats()
        _here.append(self)
        atexit.unregister(_finish)
        atexit.register(_finish, context.deadlines.stop)  # before what its groups have registered

    @property
    def _session(self) -> Session:
        assert self._open is not None, "closed, which `LLM` asks first"
        return self._open

    def stream(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Iterator[TokenEvent | Answer]:
        yield from self._session.stream(prompts, params)
        self._stats = self._all_stats()

    def _all_stats(self) -> list[RankStats]:
        return self._session.engine.groups.world.all_gather_object(self._session.stats())

    def stats(self) -> list[RankStats]:
        return self._stats

    def abort(self) -> None:
        pass  # the guard around this rank ends the job

    def close(self) -> None:
        """Also let the model go, whoever holds the `LLM`."""
        session, self._open = self._open, None
        if session is not None:
            _here.remove(self)
            session.close()


_here: list[SpmdExecutor] = []
"""Those of this process that are open, the latest last."""


def _finish(seconds: float) -> None:
    """At the interpreter's end: close them all, and only then leave MPI."""

    def close() -> None:
        while _here:
            _here[-1].close()

    guard.finalize(seconds, close)
