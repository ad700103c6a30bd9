"""Text to token ids and back, from GGUF metadata or a Hugging Face folder. Needs no transformers and no torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from shardwise.parallel.chat import render_chat
from shardwise.sharding.checkpoint.gguf import GgufFile
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.resolve import Checkpoint, has_tokenizer, no_tokenizer
from shardwise.sharding.config import read_json


class Tokenizer:
    """One model's tokenizer with its special ids and its chat template."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        stop_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        self._backend = backend
        self.bos_id = bos_id
        self.stop_ids = tuple(stop_ids)
        """Ids that end a generation."""
        self.chat_template = chat_template

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a text (BOS), if anything."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation (`{"role", "content"}` each) up to where the assistant answers. Errors as of
        `render_chat`."""
        tokens = {"bos_token": self._token(self.bos_id), "eos_token": self._token(next(iter(self.stop_ids), None))}
        return self.encode(render_chat(self.chat_template, messages, **tokens), special=False)

    def stream(self) -> Callable[[int], str]:
        """A function that takes one id after the other and returns the text that became certain, often ``""``.

        Text is held back while it ends inside a UTF-8 character, so the pieces join to what `decode` gives, without
        an incomplete last character.
        """
        state = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token: state.step(self._backend, token) or ""

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self._backend.id_to_token(token_id) or ""


class IdTokenizer:
    """Of a model that has weights but no words: prompts are token ids, answers have no text.

    why  it has none, for the CheckpointError of a text
    """

    bos_id = None
    chat_template = None

    def __init__(self, stop_ids: Sequence[int] = (), why: str = "this model has no tokenizer: pass token ids"):
        self.stop_ids, self._why = tuple(stop_ids), why

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        raise CheckpointError(self._why)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("")

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def stream(self) -> Callable[[int], str]:
        return lambda token: ""


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | IdTokenizer:
    """The tokenizer that comes with a checkpoint, CheckpointError when it is of an unknown kind.

    Random weights have an IdTokenizer, and so has a folder without any tokenizer.
    """
    if checkpoint.random_seed is not None:
        return IdTokenizer()
    return _from_gguf(checkpoint.gguf) if checkpoint.gguf is not None else _from_folder(checkpoint)


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The Jinja program that comes with a checkpoint. CheckpointError where it is not text."""
    if checkpoint.gguf is not None:
        return _template(
            checkpoint.gguf.metadata.get("tokenizer.chat_template"), f"{checkpoint.path}: tokenizer.chat_template"
        )
    file, settings = checkpoint.path / "chat_template.jinja", checkpoint.path / "tokenizer_config.json"
    if not file.is_file():
        return _template(_read_json(settings).get("chat_template"), f"{settings}: chat_template")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _template(value: Any, source: str) -> str | None:
    """A template, or the default one of several that have names."""
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{source} is {value!r:.60}, expected a text")
    return value


_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words(number: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's word pattern; Qwen2's differs only in how many digits make a piece."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + number
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# GGUF's `tokenizer.ggml.pre` -> how text falls into words before the merges.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _GPT2_WORDS,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2_WORDS]),
    "llama-bpe": lambda: _words(r"\p{N}{1,3}"),
    "qwen2": lambda: _words(r"\p{N}"),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of `tokenizer.ggml.token_type`


def _from_gguf(file: GgufFile) -> Tokenizer:
    meta = file.metadata
    kind, words = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {kind!r} with tokenizer.ggml.pre {words!r} is not supported; "
            f"supported: 'gpt2' with {', '.join(_PRE_TOKENIZERS)}"
        )
    try:
        backend, bos = _gguf_backend(meta, words)
    except Exception as error:  # the library raises no narrower one
        raise CheckpointError(f"{file.path}: tokenizer.ggml.* make no tokenizer: {error}") from None
    stops = (meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        bos_id=bos,
        stop_ids=tuple(dict.fromkeys(i for i in stops if i is not None)),
        chat_template=_template(meta.get("tokenizer.chat_template"), f"{file.path}: tokenizer.chat_template"),
    )


def _gguf_backend(meta: Mapping[str, Any], words: str) -> tuple[Backend, int | None]:
    """The library's tokenizer, and the id that begins a text."""
    tokens = meta.get("tokenizer.ggml.tokens", [])
    types = meta.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words == "llama-bpe"))
    backend.pre_tokenizer = _PRE_TOKENIZERS[words]()
    backend.decoder = decoders.ByteLevel()
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == _CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == _USER_DEFINED])
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if meta.get("tokenizer.ggml.add_bos_token", words == "llama-bpe") and bos is not None:
        _prepend(backend, tokens[bos], bos)
    return backend, bos


def _prepend(backend: Backend, token: str, token_id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


def _from_folder(checkpoint: Checkpoint) -> Tokenizer | IdTokenizer:
    folder = checkpoint.path
    file, generation = folder / "tokenizer.json", folder / "generation_config.json"
    stops = _eos_ids(_read_json(generation), generation) or _eos_ids(checkpoint.config, folder / "config.json")
    if not has_tokenizer(folder):
        return IdTokenizer(stops, f"{no_tokenizer(folder)}; prompts of token ids need none")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: the tokenizers library cannot read it: {error}") from None
    settings = folder / "tokenizer_config.json"
    named = _read_json(settings)
    bos, eos = (_id_of(backend, named.get(name), f"{settings}: {name}") for name in ("bos_token", "eos_token"))
    return Tokenizer(
        backend,
        bos_id=bos,
        stop_ids=tuple(dict.fromkeys(stops if eos is None else [*stops, eos])),
        chat_template=chat_template(checkpoint),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, dict, "one JSON object") if path.is_file() else {}


def _id_of(backend: Backend, token: Any, source: str) -> int | None:
    """Of a special token, which is a text or an object with the text as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise CheckpointError(f"{source} is {token!r:.60}, expected a text or an object with one")
    return None if text is None else backend.token_to_id(text)


def _eos_ids(config: Mapping[str, Any], source: Path) -> list[int]:
    value, text = config.get("eos_token_id"), config.get("text_config")
    if value is None and isinstance(text, dict):
        value = text.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"{source}: eos_token_id is {value!r:.60}, expected a token id or a list of them")
    return ids
