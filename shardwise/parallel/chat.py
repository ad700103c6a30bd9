"""Chat templates: a checkpoint's Jinja program, run in a sandbox."""

import datetime
import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refused(ValueError):
    """A template's own words about messages that it does not take."""


def render_chat(template: str | None, messages: Sequence[dict[str, str]], **variables: Any) -> str:
    """The prompt text that `template` makes of `messages`, up to where the assistant answers.

    The template's environment is the one that Hugging Face templates are written for (`raise_exception`,
    `strftime_now`, `tojson`, loop controls, `generation` blocks, trimmed blocks). ValueError where there is none, where
    it is not a valid template, and where it refuses the messages or fails with them.
    """
    if template is None:
        raise ValueError("this model has no chat template: pass the prompt as raw text (--raw)")
    try:
        made = _environment().from_string(template)
        return made.render(messages=list(messages), add_generation_prompt=True, **variables)
    except Refused as error:
        raise ValueError(f"chat template: {error}") from None
    except Exception as error:  # a template is a program, and fails like one
        why = f"chat template: {type(error).__name__}: {error}"
        raise ValueError(f"{why}; raw text goes without it (--raw)") from None


@cache
def _environment() -> "ImmutableSandboxedEnvironment":
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said, for training; the text is that of the block."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML characters, which belong in a prompt as they are.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
