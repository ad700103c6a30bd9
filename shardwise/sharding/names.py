"""From the patterns of a model to names of single tensors, and back."""

import re
from collections.abc import Iterable, Iterator

from shardwise.sharding.shards import TensorPattern


def expand(pattern: TensorPattern) -> Iterator[tuple[str, int | None]]:
    """(name, expert number) of every tensor of a pattern: layers outside, experts inside."""
    experts = range(pattern.spec.experts.units) if pattern.spec.experts else (None,)
    for layer in pattern.layers or (None,):
        for expert in experts:
            yield pattern.spec.path(layer, expert), expert


class NameIndex:
    """Finds the pattern of a name without expanding the patterns."""

    def __init__(self, patterns: Iterable[TensorPattern]):
        self._by_shape: dict[str, list[tuple[re.Pattern, TensorPattern]]] = {}
        for pattern in patterns:
            expression = re.escape(pattern.spec.name).replace(r"\{layer\}", r"(?P<layer>\d+)")
            expression = expression.replace(r"\{expert\}", r"(?P<expert>\d+)")
            shape = re.sub(r"\{\w+\}", "0", pattern.spec.name)
            self._by_shape.setdefault(_shape(shape), []).append((re.compile(expression), pattern))

    def find(self, name: str) -> tuple[TensorPattern, int | None, int | None]:
        """(pattern, layer, expert) of a tensor name; KeyError if the model has no such tensor."""
        for expression, pattern in self._by_shape.get(_shape(name), ()):
            match = expression.fullmatch(name)
            if match is None:
                continue
            fields = {key: int(value) for key, value in match.groupdict().items()}
            layer, expert = fields.get("layer"), fields.get("expert")
            if pattern.layers is not None and layer not in pattern.layers:
                continue
            if pattern.spec.experts and (expert is None or expert >= pattern.spec.experts.units):
                continue
            return pattern, layer, expert
        raise KeyError(f"the model has no tensor {name!r}")


def _shape(name: str) -> str:
    """The name with every numeric component as 0, a key that all names of a pattern share."""
    return ".".join("0" if part.isdigit() else part for part in name.split("."))
