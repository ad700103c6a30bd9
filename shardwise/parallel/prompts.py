"""What a model can be asked: texts, token ids or conversations, as ids, and whether they fit. Needs no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""Raw text, token ids, or a conversation of {"role", "content"} messages that the chat template formats."""


def checked(number: int, prompt: object) -> Prompt:
    """The prompt, its ids as plain integers. TypeError says what a prompt is, ValueError names text that is none."""
    if isinstance(prompt, str):
        return _text(number, prompt)
    if isinstance(prompt, Iterable) and not isinstance(prompt, bytes | Mapping):
        parts = list(prompt)
        if all(isinstance(part, Integral) for part in parts):
            return [int(part) for part in parts]
        if all(_is_message(part) for part in parts):
            return [{name: _text(number, text) for name, text in part.items()} for part in parts]
    raise TypeError(
        f"prompt {number} is {prompt!r:.60}: a prompt is a text, a list of token ids, or a conversation, which is a "
        "list of messages {'role': ..., 'content': ...} of texts; the prompts themselves stand in one more list"
    )


def encode(prompt: Prompt, tokenizer: Tokenizer | IdTokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if _is_conversation(prompt):
        return tokenizer.encode_chat(cast(Sequence[dict[str, str]], prompt))
    return [int(i) for i in cast(Sequence[int], prompt)]


@dataclass(frozen=True)
class PromptLimits:
    """What bounds a request: ids below `vocab`, and tokens of prompt and answer together."""

    vocab: int
    context: int | None
    """Where an answer ends at the latest; None: nowhere."""
    cache: int | None = None
    """Tokens of one sequence that the KV cache holds; None: the whole context."""

    def longest(self, prompt: int, new: int) -> int:
        """Tokens that a prompt of so many with its answer may have."""
        return min(prompt + new, self.context or prompt + new)


def require_fit(number: int, ids: Sequence[int], new: int, limits: PromptLimits) -> None:
    """ValueError names the prompt that is empty, leaves no room in the context, has an id that is not a token, or may
    outgrow the cache with an answer of `new` tokens."""
    if not ids:
        raise ValueError(f"prompt {number} has no tokens")
    wrong = [i for i in ids if not 0 <= i < limits.vocab]
    if wrong:
        raise ValueError(f"prompt {number}: token id {wrong[0]} is not in the vocabulary of {limits.vocab}")
    if limits.context and len(ids) >= limits.context:
        raise ValueError(f"prompt {number} has {len(ids)} tokens, the model's context holds {limits.context}")
    longest = limits.longest(len(ids), new)
    if limits.cache is not None and longest > limits.cache:
        raise ValueError(
            f"prompt {number} may become {longest} tokens long with its answer, the cache holds {limits.cache}; "
            "give it more tokens, or ask for fewer new ones"
        )


def encode_fitting(
    prompts: Sequence[Prompt], new: Sequence[int], tokenizer: Tokenizer | IdTokenizer, limits: PromptLimits
) -> list[list[int]]:
    """Ids of each prompt. Errors as of `encode` and `require_fit`; `new` counts each answer's tokens."""
    found = [encode(prompt, tokenizer) for prompt in prompts]
    for number, (ids, count) in enumerate(zip(found, new, strict=True)):
        require_fit(number, ids, count, limits)
    return found


def _text(number: int, text: Any) -> Any:
    """As it is; half a surrogate pair, which Python puts for bytes that are no UTF-8, is no character."""
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt {number} is no Unicode text: {error.reason} at character {error.start}") from None
    return text


def _is_message(part: object) -> bool:
    return isinstance(part, dict) and all(isinstance(part.get(name), str) for name in ("role", "content"))


def _is_conversation(prompt: Prompt) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], dict)
