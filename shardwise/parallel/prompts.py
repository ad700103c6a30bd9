"""What a model can be asked: texts, token ids or conversations, as ids, and whether they fit. Needs no torch."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from shardwise.parallel.tokenizer import IdTokenizer, Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""Raw text, token ids, or a conversation of {"role", "content"} messages that the chat template formats."""
TEMPLATE_TOKENS = 512
"""What chat templates put around a conversation at most, to be on the safe side: gpt-oss, among the longest, 100."""


def encode(prompt: Prompt, tokenizer: Tokenizer | IdTokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if _is_conversation(prompt):
        return tokenizer.encode_chat(cast(Sequence[dict[str, str]], prompt))
    return [int(i) for i in cast(Sequence[int], prompt)]


def require_fit(number: int, ids: Sequence[int], *, vocab: int, context: int | None) -> None:
    """ValueError names the prompt that is empty, leaves no room in the context or has an id that is no token."""
    if not ids:
        raise ValueError(f"prompt {number} has no tokens")
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong:
        raise ValueError(f"prompt {number}: token id {wrong[0]} is not in the vocabulary of {vocab}")
    if context and len(ids) >= context:
        raise ValueError(f"prompt {number} has {len(ids)} tokens, the model's context holds {context}")


def refuse_unfit(
    prompts: Iterable[Prompt], tokenizer: Callable[[], Tokenizer | IdTokenizer], *, vocab: int, context: int | None
) -> None:
    """`require_fit` of each, for a process without the model: texts that surely fit need no tokenizer."""
    for number, prompt in enumerate(prompts):
        if not surely_fits(prompt, context):
            require_fit(number, encode(prompt, tokenizer()), vocab=vocab, context=context)


def surely_fits(prompt: Prompt, context: int | None) -> bool:
    """Of texts: a token is a byte at least."""
    if isinstance(prompt, str):
        size = len(prompt.encode())
    elif _is_conversation(prompt):
        size = sum(len(str(part).encode()) for message in prompt for part in cast(dict, message).values())
    else:
        return False  # ids, which need no tokenizer
    return size > 0 and (not context or size + TEMPLATE_TOKENS < context)


def _is_conversation(prompt: Prompt) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], dict)
