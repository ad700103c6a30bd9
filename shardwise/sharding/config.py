"""Checked access to a published config.json: wrong types and impossible sizes raise with file and field named."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwise.sharding.checkpoint.header import TensorEntry

MAX_CONFIG_BYTES = 64 << 20
"""Published files are below 100 KB; long ignore lists reach 2 MB."""

MOST = 1 << 31
COUNTS = {"layer": 10_000, "depth": 10_000, "expert": 1 << 16, "head": 1 << 16, "group": 1 << 16}
"""Bounds of what the planner enumerates, by a word in the field's name: ten times what any model has."""

_REQUIRED: Any = object()
_FLOATS = {text: float(text) for text in ("Infinity", "-Infinity", "NaN")}
_JSON_NAMES = {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null", "bool": "true or false"}


class ConfigError(ValueError):
    """A config cannot describe a model; the text names file, field, value and what is expected."""


class Config:
    """Fields of one JSON object. Several names mean aliases, first one present (and not null) wins.

    A nested section falls back to its parent, because checkpoints put shared fields at either level.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        source: str,
        parent: "Config | None" = None,
        names: Mapping[str, "TensorEntry"] | None = None,
    ):
        self.data, self.source, self.parent = data, source, parent
        inherited = parent.names if parent is not None else None
        self.names: Mapping[str, TensorEntry] | None = names if names is not None else inherited
        """Tensors of the checkpoint beside the config, where there is one: some families have two spellings."""

    @property
    def outermost(self) -> "Config":
        """The config of the whole model, of which this may be a section."""
        return self.parent.outermost if self.parent else self

    def raw(self, *names: str) -> Any:
        """The first of these fields that is present and not null, else None."""
        for name in names:
            if self.data.get(name) is not None:
                return _plain(self.data[name])
        return self.parent.raw(*names) if self.parent else None

    def has(self, *names: str) -> bool:
        return self.raw(*names) is not None

    def has_tensor(self, name: str) -> bool:
        """Whether a checkpoint is known and holds this tensor."""
        return self.names is not None and name in self.names

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """As the checkpoint has this tensor, where one is known and has it."""
        return self.names[name].shape if self.names is not None and name in self.names else None

    def integer(self, *names: str, default: Any = _REQUIRED, least: int = 1, most: int | None = None) -> int:
        """An integer in `[least, most]`; whole floats are accepted, as some exporters write them.

        Without `most`, counts of layers, experts and heads have the bounds of COUNTS, anything else MOST.
        """
        value = self._get(names, default)
        if most is None:
            most = next((bound for word, bound in COUNTS.items() if word in names[0]), MOST)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(names, value, "an integer")
        if not least <= value <= most:
            raise self.error(names, value, f"an integer from {least} to {most}")
        return value

    def number(
        self, *names: str, default: Any = _REQUIRED, above: float | None = None, most: float = sys.float_info.max
    ) -> float:
        """A finite number, greater than `above` and at most `most` where they are given; no epsilon is negative."""
        value = self._get(names, default)
        if value is default:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise self.error(names, value, "a finite number")
        if above is not None and value <= above:
            raise self.error(names, value, f"a number above {above:g}")
        if value > most:
            raise self.error(names, value, f"a number of at most {most:g}")
        if "eps" in names[0] and value < 0:
            raise self.error(names, value, "a number of at least 0")
        return float(value)

    def fraction(self, *names: str, default: Any = _REQUIRED) -> float:
        """A number above 0 and at most 1."""
        value = self.number(*names, default=default, above=0.0)
        if value is not default and value > 1:
            raise self.error(names, value, "a number of at most 1")
        return value

    def flag(self, *names: str, default: bool = False) -> bool:
        value = self._get(names, default)
        if not isinstance(value, bool):
            raise self.error(names, value, "true or false")
        return value

    def text(self, *names: str, default: Any = _REQUIRED) -> str:
        value = self._get(names, default)
        if value is default:
            return value
        if not isinstance(value, str):
            raise self.error(names, value, "a string")
        return value

    def list(self, *names: str, default: Any = _REQUIRED, length: int | None = None, of: type | tuple = object) -> list:
        """A list, of `length` items where given, each an instance of `of`."""
        value = self._get(names, default)
        if value is default:
            return value
        if not isinstance(value, list) or not all(isinstance(item, of) for item in value):
            raise self.error(names, value, "a list" if of is object else f"a list of {getattr(of, '__name__', of)}")
        if length is not None and len(value) != length:
            raise self.error(names, value, f"a list of {length} items, one a layer, not {len(value)}")
        return value

    def section(self, *names: str) -> "Config":
        """A nested object; an empty one where it is missing."""
        value = self._get(names, {})
        if not isinstance(value, Mapping):
            raise self.error(names, value, "an object")
        return Config(value, self.source, self)

    def own(self, *names: str) -> "Config":
        """Like `section`, without falling back to this config."""
        return Config(self.section(*names).data, self.source)

    def error(self, names: tuple[str, ...], value: Any, expected: str) -> ConfigError:
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) < 60 else shown[:57] + "..."
        return ConfigError(f"{self.source}: {' / '.join(names)} is {shown}, expected {expected}")

    def _get(self, names: tuple[str, ...], default: Any) -> Any:
        value = self.raw(*names)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(
                f"{self.source}: {' / '.join(names)} is missing; the planner needs it for this architecture"
            )
        return default


def _plain(value: Any) -> Any:
    """Transformers writes an infinite number as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return _FLOATS.get(str(value["__float__"]), value)
    return [_plain(v) for v in value] if isinstance(value, list) else value


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError for anything else."""
    return read_json(path, dict, "one JSON object")


def read_json(path: str | Path, kind: type, expected: str) -> Any:
    """The value in a JSON file, of this kind; ConfigError for anything else. `Infinity` and `NaN` are accepted."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: {size} bytes, a config has at most {MAX_CONFIG_BYTES}")
        text = path.read_text("utf-8")
        if not text.strip():
            raise ConfigError(f"{path}: is empty, expected {expected}")
        data = json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a config") from None
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, kind):
        found = _JSON_NAMES.get(type(data).__name__, "a number")
        raise ConfigError(f"{path}: holds {found}, expected {expected}")
    return data
