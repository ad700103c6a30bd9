"""Chat templates: a checkpoint's Jinja program, run in a sandbox."""

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn


def render_chat(template: str, messages: Sequence[dict[str, str]], **variables: Any) -> str:
    """The prompt text that `template` makes of `messages`, up to where the assistant answers.

    The template's environment is the one that Hugging Face templates are written for (`raise_exception`,
    `strftime_now`, `tojson`, loop controls, trimmed blocks). ValueError with the template's own message when it
    refuses the messages or is no valid template.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **variables
        )
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML characters, which belong in a prompt as they are.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"chat template: {message}")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
