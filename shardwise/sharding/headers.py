"""Binds a model to the headers of its checkpoint: storage types come from the file, shapes must agree."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from shardwise.sharding.axes import LogicalAxis, fixed
from shardwise.sharding.checkpoint.header import STORAGE, CheckpointError, TensorEntry
from shardwise.sharding.model import Extra, ModelSpec
from shardwise.sharding.spec import Block, Moe
from shardwise.sharding.tensors import TensorSpec

SHOWN = 5
"""Tensor names that a message lists before it only counts."""
_PARTS = {
    "vision": ("visual", "vision", "multi_modal_projector", "mm_projector", "patch_merge", "vit_"),
    "audio": ("audio",),
    "mtp": ("mtp",),
}


def bind(model: ModelSpec, tensors: Mapping[str, TensorEntry]) -> ModelSpec:
    """The model with the storage types of `tensors`. CheckpointError for missing tensors and for shapes that differ.

    What the model does not have becomes extras.
    """
    binder = _Binder(tensors)
    bound = model.map_blocks(binder.block, lambda layer: tuple(layer.tensors))
    binder.raise_if_wrong(model)
    extras = binder.extras(model)
    left = [entry for name, entry in tensors.items() if name not in binder.used]
    extras += leftovers(left, len(model.layers))
    packed = sorted({e.dtype for e in tensors.values() if STORAGE[e.dtype][0] > 1})
    if packed:
        bound = replace(bound, quantization=" + ".join(packed))
    notes = tuple(f"not part of {model.architecture}, left out: {e.note}" for e in extras if e.name == "other")
    return replace(bound, extras=extras, notes=model.notes + notes)


def leftovers(entries: list[TensorEntry], layers: int) -> tuple[Extra, ...]:
    """Tensors that no block asked for, as extras by what their names say, each whole."""
    groups: dict[str, list[TensorSpec]] = {}
    for entry in entries:
        spec = TensorSpec(entry.name, entry.name, tuple(fixed(n) for n in entry.shape), entry.dtype)
        groups.setdefault(_part(entry.name, layers), []).append(spec)
    return tuple(
        Extra(
            name=part,
            tensors=tuple(specs),
            note=f"{len(specs)} tensors, from headers: {_some([t.name for t in specs])}",
        )
        for part, specs in groups.items()
    )


def part_of(name: str) -> str:
    """`vision`, `audio`, `mtp`, or `other` by the words in a tensor's name."""
    return next((part for part, words in _PARTS.items() if any(word in name for word in words)), "other")


def _part(name: str, layers: int) -> str:
    number = re.search(r"layers\.(\d{1,9})\.", name)
    past_the_end = number is not None and int(number[1]) >= layers
    part = part_of(name)
    return "mtp" if part == "other" and past_the_end else part


class _Binder:
    """Looks up specs and gathers what is wrong, so that one message names it all."""

    def __init__(self, tensors: Mapping[str, TensorEntry]):
        self.tensors = tensors
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misfits: list[str] = []

    def block(self, block: Block, layer: int | None = None) -> Any:
        tensors = (self.tensor(t, layer) for t in block.tensors)
        bound = replace(block, tensors=tuple(t for t in tensors if t is not None))
        if isinstance(bound, Moe) and bound.shared is not None:
            return replace(bound, shared=self.block(bound.shared, layer))
        return bound

    def tensor(self, spec: TensorSpec, layer: int | None) -> TensorSpec | None:
        experts: LogicalAxis | None = spec.experts
        dtypes: dict[str, str] = {}
        shape, base, dims = spec.shape, spec.path(layer), spec.dims
        for expert in range(experts.units) if experts else (None,):
            name = base if expert is None else base.replace("{expert}", str(expert))
            entry = self.tensors.get(name)
            if entry is None and spec.optional:
                return None
            if entry is None:
                self.missing.append(name)
                continue
            self.used.add(name)
            dtypes[entry.dtype] = name
            if prod(entry.shape) == prod(shape) == 1:
                dims = tuple(fixed(1) for _ in entry.shape)  # a scale of a tensor is written as [] or as [1]
            elif entry.shape != shape:
                self.misfits.append(f"{name} has shape {list(entry.shape)}, the config says {list(shape)}")
        if len(dtypes) > 1:
            self.misfits.append(f"experts of {spec.name} have different types: {' and '.join(dtypes)}")
        return replace(spec, dtype=next(iter(dtypes), spec.dtype), dims=dims)

    def extras(self, model: ModelSpec) -> tuple[Extra, ...]:
        """The extras of the config that the checkpoint holds completely; the others are left to `leftovers`."""
        kept = []
        for extra in model.extras:
            names = [t.path(layer) for t in extra.tensors for layer in (extra.layers or (None,)) if not t.optional]
            if names and all("{expert}" in n or n in self.tensors for n in names):
                kept.append(replace(extra, tensors=self._first(extra)))
        return tuple(kept)

    def _first(self, extra: Extra) -> tuple[TensorSpec, ...]:
        """The tensors of an extra with the types of its first layer; all its layers count as used."""
        for layer in (extra.layers or (None,))[1:]:
            for spec in extra.tensors:
                self.tensor(spec, layer)
        bound = (self.tensor(t, extra.layers[0] if extra.layers else None) for t in extra.tensors)
        return tuple(t for t in bound if t is not None)

    def raise_if_wrong(self, model: ModelSpec) -> None:
        files = sorted({entry.path for entry in self.tensors.values()})
        where = (files[0] if len(files) == 1 else files[0].parent) if files else "the checkpoint"
        if self.missing:
            raise CheckpointError(
                f"{where}: tensors of {model.architecture} are missing ({len(self.missing)}): "
                f"{_some(self.missing)}; the checkpoint has {len(self.tensors)} tensors"
            )
        if self.misfits:
            raise CheckpointError(f"{where}: {'; '.join(self.misfits[:SHOWN])}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
