"""What an engine hands out. Free of torch, so that the process that only started the ranks can use it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token of one request."""

    request: int
    """Number of the prompt in the call."""
    token_id: int
    text: str
    """Text that became certain with this token, often ``""``; the events' texts join to the completion's."""
    finished: bool = False
    finish_reason: str | None = None
    """`stop` (a stop id or text) or `length`, in the last event of a request."""
    in_answer: bool = True
    """False for a stop id, which ends the answer and is not part of it."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    """Without the stop id that ended it."""
    prompt_tokens: int
    finish_reason: str


class CompletionCollector:
    """Collects the events of one call into its completions. `prompt_tokens`: of each prompt."""

    def __init__(self, prompt_tokens: Sequence[int]):
        self._prompt_tokens = prompt_tokens
        self._texts, self._reasons = [""] * len(prompt_tokens), [""] * len(prompt_tokens)
        self._ids: list[list[int]] = [[] for _ in prompt_tokens]

    def add(self, event: TokenEvent) -> None:
        self._texts[event.request] += event.text
        self._reasons[event.request] = event.finish_reason or ""
        if event.in_answer:
            self._ids[event.request].append(event.token_id)

    def completions(self) -> list[Completion]:
        columns = zip(self._texts, self._ids, self._prompt_tokens, self._reasons, strict=True)
        return [Completion(text, tuple(ids), count, reason) for text, ids, count, reason in columns]


@dataclass(frozen=True, slots=True)
class RankStats:
    """What one rank holds and held."""

    rank: int
    weight_bytes: int
    cache_bytes: int
    peak_rss_bytes: int
    """Of the process, which ranks that are threads share."""
    load_seconds: float
    decode: str = ""
    """Which code runs the steps that decode, and why."""
    weights: str = ""
    """The form in which the weights are held, and why."""
    cache: str = ""
    """How the KV cache is kept, and on a GPU whose kernels attend to prompts."""
